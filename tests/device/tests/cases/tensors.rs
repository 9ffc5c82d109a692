//! Tensors and sets: cases 23 to 30, 48.
#![forbid(unsafe_code)]

use device_tests::{Emulated, Session};
use proptest::prelude::*;
use std::sync::{Arc, LazyLock};
use trn_kernels::neuron::{NeuronError, Read, Status, TensorSet, Write};

fn read(tensor: &trn_kernels::neuron::Tensor) -> Vec<u8> {
    let mut bytes = vec![0; tensor.len()];
    tensor.read(0, &mut bytes).unwrap();
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Against a plain array: any sequence of writes, fills and copies within and beyond the ends.
    #[test]
    fn case_23_writes_and_reads_are_those_of_an_array(
        size in 1usize..300,
        steps in prop::collection::vec((0u8..4, 0usize..320, 0usize..320, any::<u8>()), 0..24),
    ) {
        static SESSION: LazyLock<Session> = LazyLock::new(Session::open);
        let tensor = SESSION.runtime.allocate(0, size, "t").unwrap();
        let other = SESSION.runtime.allocate(0, size, "o").unwrap();
        let mut model = vec![0xA5; size];
        other.fill(9).unwrap();
        for (step, offset, len, byte) in steps {
            let fits = offset + len <= size;
            let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8)).collect();
            match step {
                0 => {
                    prop_assert_eq!(tensor.write(offset, &bytes).is_ok(), fits);
                    if fits { model[offset..offset + len].copy_from_slice(&bytes); }
                }
                1 => {
                    tensor.fill(byte).unwrap();
                    model.fill(byte);
                }
                2 => {
                    prop_assert_eq!(other.copy_to(offset, &tensor, offset, len).is_ok(), fits);
                    if fits { model[offset..offset + len].fill(9); }
                }
                _ => {
                    let mut got = vec![0; len];
                    prop_assert_eq!(tensor.read(offset, &mut got).is_ok(), fits);
                    if fits { prop_assert_eq!(&got[..], &model[offset..offset + len]); }
                }
            }
        }
        prop_assert_eq!(read(&tensor), model);
        SESSION.emulated.assert_no_violation();
    }
}

#[test]
fn case_24_ranges_that_leave_their_tensor_reach_nobody() {
    let session = Session::open();
    let tensor = session.runtime.allocate(0, 100, "t").unwrap();
    let other = session.runtime.allocate(0, 50, "o").unwrap();
    let calls = session.emulated.log();
    for (offset, len) in [(0, 101), (100, 1), (99, 2), (usize::MAX, 1), (usize::MAX - 50, 51), (101, 0)] {
        let out = NeuronError::OutOfBounds { tensor: "t".into(), offset, len, size: 100 };
        assert_eq!(tensor.write(offset, &vec![0; len]), Err(out.clone()));
        assert_eq!(tensor.read(offset, &mut vec![0; len]), Err(out.clone()));
        assert_eq!(tensor.copy_to(offset, &other, 0, len), Err(out.clone()));
        let slice = tensor.slice(offset, len, "s").map(|_| ());
        assert_eq!(slice, Err(if len == 0 { NeuronError::Empty { tensor: "s".into() } } else { out.clone() }));
        let (a, b) = (vec![0; len], vec![0; 1]);
        let writes = [Write { tensor: &other, offset: 0, bytes: &b }, Write { tensor: &tensor, offset, bytes: &a }];
        assert_eq!(session.runtime.write_batch(&writes), Err(out));
    }
    let huge = NeuronError::OutOfBounds { tensor: "t".into(), offset: 1, len: usize::MAX, size: 100 };
    assert_eq!(tensor.copy_to(1, &other, 0, usize::MAX), Err(huge.clone()));
    assert_eq!(tensor.slice(1, usize::MAX, "s").map(|_| ()), Err(huge));
    let beyond = NeuronError::OutOfBounds { tensor: "o".into(), offset: 1, len: 50, size: 50 };
    assert_eq!(tensor.copy_to(0, &other, 1, 50), Err(beyond));
    // Nothing at the very end is nothing, and no call either.
    tensor.write(100, &[]).unwrap();
    tensor.read(100, &mut []).unwrap();
    assert_eq!(session.emulated.log(), calls);
    drop((tensor, other));
    session.end();
}

#[test]
fn case_25_sizes_that_cannot_be() {
    let emulated = Emulated::new();
    emulated.set_version([2, 30, 49, 0]);
    let session = Session::on(emulated);
    let calls = session.emulated.log();
    assert_eq!(session.runtime.allocate(0, 0, "t").unwrap_err(), NeuronError::Empty { tensor: "t".into() });
    for bytes in [1usize << 32, (1 << 32) + 16, usize::MAX] {
        let (tensor, limit) = ("t".to_owned(), u64::from(u32::MAX));
        let refused = session.runtime.allocate(0, bytes, "t").unwrap_err();
        assert_eq!(refused, NeuronError::TooLarge { tensor, bytes: bytes as u64, limit });
        assert!(refused.to_string().contains("2.30.50"), "{refused}");
    }
    assert_eq!(session.emulated.log(), calls);
    session.end();
    // Later runtimes are asked, and say that there is not as much; no host has more than the address space.
    let session = Session::open();
    let refused = session.runtime.allocate(0, (4 << 30) + 16, "t").unwrap_err();
    assert_eq!(refused.status(), Some(Status::RESOURCE));
    assert!(matches!(session.runtime.allocate(0, usize::MAX, "t"), Err(NeuronError::TooLarge { .. })));
    session.end();
}

#[test]
fn case_26_names_with_a_nul() {
    let session = Session::open();
    let tensor = Arc::new(session.runtime.allocate(0, 8, "t").unwrap());
    let mut set = TensorSet::new(&session.runtime, 0).unwrap();
    let calls = session.emulated.log();
    for (name, problem) in [("a\0b", "a NUL in it"), ("\0", "a NUL in it"), (&"n".repeat(257), "more than 256 bytes")] {
        let refused = |r: Result<(), NeuronError>| {
            assert_eq!(r, Err(NeuronError::Name { name: name.into(), problem }));
        };
        refused(session.runtime.allocate(0, 8, name).map(|_| ()));
        refused(tensor.slice(0, 4, name).map(|_| ()));
        refused(set.insert(name, Arc::clone(&tensor)));
        refused(set.get(name).map(|_| ()));
    }
    assert_eq!(session.emulated.log(), calls);
    drop((set, tensor));
    session.end();
}

#[test]
fn case_27_views_share_bytes_and_outlive_their_source() {
    let session = Session::open();
    let parent = session.runtime.allocate(0, 32, "parent").unwrap();
    parent.fill(1).unwrap();
    let view = parent.slice(8, 16, "view").unwrap();
    let inner = view.slice(4, 4, "view of a view").unwrap();
    inner.write(0, &[7; 4]).unwrap();
    assert_eq!(read(&parent)[8..20], [[1; 4], [7; 4], [1; 4]].concat());
    // Within one allocation a copy may not lie on itself.
    assert!(matches!(parent.copy_to(0, &view, 0, 9), Err(NeuronError::Overlap { .. })));
    parent.copy_to(0, &view, 0, 8).unwrap();
    drop(parent);
    assert_eq!(read(&view), [[1; 4], [1; 4], [1; 4], [1; 4]].concat());
    drop(view);
    assert_eq!(read(&inner), [1; 4]);
    drop(inner);
    session.end();
}

#[test]
fn case_28_copies_stay_on_their_core() {
    let session = Session::open();
    let [a, b] = [0, 0].map(|core| session.runtime.allocate(core, 8, "near").unwrap());
    let far = session.runtime.allocate(1, 8, "far").unwrap();
    a.write(0, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    b.fill(0).unwrap();
    a.copy_to(2, &b, 5, 3).unwrap();
    assert_eq!(read(&b), [0, 0, 0, 0, 0, 3, 4, 5]);
    let calls = session.emulated.log();
    let wrong = NeuronError::WrongCore { tensor: "far".into(), got: 1, needed: 0 };
    assert_eq!(a.copy_to(0, &far, 0, 8), Err(wrong));
    assert_eq!(session.emulated.log(), calls);
    // A tensor of another runtime.
    let other = Session::open();
    let foreign = other.runtime.allocate(0, 8, "foreign").unwrap();
    assert_eq!(a.copy_to(0, &foreign, 0, 8), Err(NeuronError::OtherRuntime { tensor: "foreign".into() }));
    drop(foreign);
    other.end();
    drop((a, b, far));
    session.end();
}

#[test]
fn case_29_fresh_memory_is_not_zero() {
    let session = Session::open();
    let tensor = session.runtime.allocate(0, 33, "t").unwrap();
    assert_eq!(read(&tensor), [0xA5; 33], "whoever counts on zeros shall be found out");
    for byte in [0, 0x80, 0xFF] {
        tensor.fill(byte).unwrap();
        assert_eq!(read(&tensor), [byte; 33]);
    }
    drop(tensor);
    session.end();
}

#[test]
fn case_30_one_name_one_tensor() {
    let session = Session::open();
    let [first, second] = ["first", "second"].map(|n| Arc::new(session.runtime.allocate(0, 8, n).unwrap()));
    let mut set = TensorSet::new(&session.runtime, 0).unwrap();
    set.insert("x", Arc::clone(&first)).unwrap();
    set.insert("x", Arc::clone(&second)).unwrap();
    assert!(Arc::ptr_eq(set.get("x").unwrap(), &second));
    assert_eq!(Arc::strong_count(&first), 1, "the one that was replaced is let go");
    let missing = NeuronError::NoSuchTensor { tensor: "y".into(), usage: None, known: vec!["x".into()] };
    assert_eq!(set.get("y").map(|_| ()), Err(missing));
    assert!(matches!(set.insert("", Arc::clone(&first)), Err(NeuronError::Name { .. })));
    // A failed replacement leaves the name without a tensor, and both alive for as long as the library may hold either.
    session.emulated.inject("nrt_add_tensor_to_tensor_set", 1, 0, 1);
    assert!(set.insert("x", Arc::clone(&first)).is_err());
    assert!(set.get("x").is_err());
    assert_eq!((Arc::strong_count(&first), Arc::strong_count(&second)), (2, 2));
    drop(set);
    assert_eq!((Arc::strong_count(&first), Arc::strong_count(&second)), (1, 1));
    drop((first, second));
    session.end();
}

#[test]
fn case_48_batches_are_the_same_bytes() {
    let batch = ["nrt_tensor_read_batch", "nrt_tensor_write_batch"];
    let results = [Session::open(), Session::on(Emulated::without(&batch))].map(|session| {
        let runtime = &session.runtime;
        let [a, b] = [40, 24].map(|bytes| runtime.allocate(0, bytes, "t").unwrap());
        let view = a.slice(16, 8, "view").unwrap();
        let bytes: Vec<u8> = (0..64).collect();
        let write = |tensor, offset, range: std::ops::Range<usize>| Write { tensor, offset, bytes: &bytes[range] };
        // In order: the later of two that overlap is the one that stays.
        runtime
            .write_batch(&[write(&a, 0, 0..40), write(&b, 4, 5..15), write(&view, 2, 50..54), write(&b, 0, 0..0)])
            .unwrap();
        let (mut x, mut y, mut z) = (vec![0; 40], vec![0; 24], vec![]);
        let mut reads = [
            Read { tensor: &a, offset: 0, into: &mut x },
            Read { tensor: &b, offset: 0, into: &mut y },
            Read { tensor: &view, offset: 8, into: &mut z },
        ];
        runtime.read_batch(&mut reads).unwrap();
        runtime.write_batch(&[]).unwrap();
        let traffic = runtime.traffic();
        assert_eq!((traffic.to_device, traffic.from_device), (54, 64));
        let single = session.emulated.calls("nrt_tensor_write");
        drop((a, b, view));
        session.end();
        (x, y, single)
    });
    let [(x, y, none), (x2, y2, each)] = results;
    assert_eq!((&x, &y), (&x2, &y2));
    assert_eq!((none, each), (0, 3), "one call with the library's batches, three without");
    assert_eq!(x[16..24], [16, 17, 50, 51, 52, 53, 22, 23]);
}
