//! The emulated library itself, driven without a wrapper: faults, versions, aliases, threads, forks, copies.
#![allow(unsafe_code)]

use device_tests::programs::Checked;
use device_tests::raw::{Handle, Raw};
use device_tests::{Emulated, Kind, flag};
use std::ffi::CString;
use std::process::Command;
use std::ptr::null_mut;
use std::time::Instant;
use trn_kernels::neuron::neff;
use trn_kernels::trainium::emulator::Options;

/// A program that writes `new` over the second half of `cache`, in place, and gives back what `cache` was.
const IN_PLACE: &[u8] = br#"{"format":"trn-kernels.program.1","kernel":"append","example":"e","target":"trn2","sources":{},"parameters":{},
"inputs":[{"name":"cache","tensor":0},{"name":"new","tensor":1}],
"outputs":[{"name":"output_0","tensor":0},{"name":"old","tensor":2}],
"tensors":[{"name":"","shape":[8],"dtype":"uint8","buffer":"private_hbm"},
{"name":"","shape":[4],"dtype":"uint8","buffer":"private_hbm"},{"name":"","shape":[8],"dtype":"uint8","buffer":"shared_hbm"}],
"instructions":[
{"name":"dma_copy","engine":"dma","writes":{"dst":[2,"uint8",0,[[1,8]]]},"reads":{"src":[0,"uint8",0,[[1,8]]]},"attrs":{}},
{"name":"dma_copy","engine":"dma","writes":{"dst":[0,"uint8",4,[[1,4]]]},"reads":{"src":[1,"uint8",0,[[1,4]]]},"attrs":{}}]}"#;

/// What C would write, with its panics.
struct Client {
    emulated: Emulated,
    raw: Raw,
}

impl Client {
    fn new() -> Client {
        let emulated = Emulated::new();
        let raw = emulated.raw();
        Client { emulated, raw }
    }

    fn open() -> Client {
        let client = Client::new();
        assert_eq!(client.init(), 0);
        client
    }

    fn init(&self) -> u32 {
        // SAFETY: both strings are NUL-terminated.
        unsafe { (self.raw.nrt_init)(1, c"".as_ptr(), c"".as_ptr()) }
    }

    fn close(&self) {
        // SAFETY: no requirement.
        unsafe { (self.raw.nrt_close)() }
    }

    fn load(&self, neff: &[u8], core: i32) -> Result<Handle, u32> {
        let mut model = null_mut();
        // SAFETY: the bytes are readable and the place is writable.
        match unsafe { (self.raw.nrt_load)(neff.as_ptr(), neff.len(), core, -1, &mut model) } {
            0 => Ok(model),
            status => {
                assert!(model.is_null(), "an error must leave the place alone");
                Err(status)
            }
        }
    }

    fn unload(&self, model: Handle) -> u32 {
        // SAFETY: any handle may be passed.
        unsafe { (self.raw.nrt_unload)(model) }
    }

    fn allocate(&self, core: i32, bytes: usize) -> Result<Handle, u32> {
        let mut tensor = null_mut();
        // SAFETY: the name is NUL-terminated and the place is writable.
        match unsafe { (self.raw.nrt_tensor_allocate)(0, core, bytes, c"t".as_ptr(), &mut tensor) } {
            0 => Ok(tensor),
            status => Err(status),
        }
    }

    fn write(&self, tensor: Handle, bytes: &[u8]) -> u32 {
        // SAFETY: the bytes are readable.
        unsafe { (self.raw.nrt_tensor_write)(tensor, bytes.as_ptr(), 0, bytes.len()) }
    }

    fn read(&self, tensor: Handle) -> Vec<u8> {
        // SAFETY: any handle may be passed.
        let mut bytes = vec![0; unsafe { (self.raw.nrt_tensor_get_size)(tensor) }];
        // SAFETY: the buffer is as long as said.
        assert_eq!(unsafe { (self.raw.nrt_tensor_read)(tensor, bytes.as_mut_ptr(), 0, bytes.len()) }, 0);
        bytes
    }

    fn free(&self, mut tensor: Handle) {
        // SAFETY: the place is readable and writable.
        unsafe { (self.raw.nrt_tensor_free)(&mut tensor) }
    }

    fn set(&self, members: &[(&str, Handle)]) -> Handle {
        let mut set = null_mut();
        // SAFETY: the place is writable.
        assert_eq!(unsafe { (self.raw.nrt_allocate_tensor_set)(&mut set) }, 0);
        for (name, tensor) in members {
            let name = CString::new(*name).unwrap();
            // SAFETY: the name is NUL-terminated.
            assert_eq!(unsafe { (self.raw.nrt_add_tensor_to_tensor_set)(set, name.as_ptr(), *tensor) }, 0);
        }
        set
    }

    fn destroy(&self, mut set: Handle) {
        // SAFETY: the place is readable and writable.
        unsafe { (self.raw.nrt_destroy_tensor_set)(&mut set) }
    }

    fn execute(&self, model: Handle, inputs: Handle, outputs: Handle) -> u32 {
        // SAFETY: any handles may be passed.
        unsafe { (self.raw.nrt_execute)(model, inputs, outputs) }
    }

    /// Sizes and dtypes that the runtime reports, in order.
    fn infos(&self, model: Handle) -> Vec<(u64, u32)> {
        let mut array = null_mut();
        // SAFETY: the place is writable.
        assert_eq!(unsafe { (self.raw.nrt_get_model_tensor_info)(model, &mut array) }, 0);
        // SAFETY: a count, then infos of 37 words; the count is the library's own.
        let word = |i: usize| unsafe { array.wrapping_add(i).read() };
        let info = |i: usize| (word(1 + i * 37 + 33), word(1 + i * 37 + 34) as u32);
        let infos = (0..word(0) as usize).map(info).collect();
        // SAFETY: the array is live.
        assert_eq!(unsafe { (self.raw.nrt_free_model_tensor_info)(array) }, 0);
        infos
    }
}

/// A model with its tensors bound.
struct Bound {
    model: Handle,
    tensors: Vec<Handle>,
    sets: [Handle; 2],
}

impl Client {
    /// Loads a checked-in program on core 0 and binds its inputs.
    fn bind(&self, checked: &Checked) -> Bound {
        let model = self.load(&neff::emulated(&checked.json, false).unwrap(), 0).unwrap();
        let mut tensors = vec![];
        let mut make = |bytes: usize| {
            tensors.push(self.allocate(0, bytes).unwrap());
            tensors[tensors.len() - 1]
        };
        let program = &checked.program;
        let mut side = |ports: &[trn_kernels::trainium::emulator::Port]| -> Vec<(String, Handle)> {
            ports.iter().map(|p| (p.name.clone(), make(program.tensors()[p.tensor].bytes()))).collect()
        };
        let (inputs, outputs) = (side(program.inputs()), side(program.outputs()));
        for ((_, tensor), bytes) in inputs.iter().zip(checked.inputs()) {
            assert_eq!(self.write(*tensor, &bytes), 0);
        }
        let members =
            |side: &[(String, Handle)]| self.set(&side.iter().map(|(n, t)| (n.as_str(), *t)).collect::<Vec<_>>());
        Bound { model, sets: [members(&inputs), members(&outputs)], tensors }
    }

    fn release(&self, bound: Bound) {
        bound.sets.into_iter().for_each(|s| self.destroy(s));
        bound.tensors.into_iter().for_each(|t| self.free(t));
        assert_eq!(self.unload(bound.model), 0);
    }
}

#[test]
fn in_place_variables_are_one_tensor() {
    let client = Client::open();
    let model = client.load(&neff::emulated(IN_PLACE, true).unwrap(), 0).unwrap();
    let [cache, other, old] = [(); 3].map(|()| client.allocate(0, 8).unwrap());
    let new = client.allocate(0, 4).unwrap();
    client.write(cache, &[1, 2, 3, 4, 5, 6, 7, 8]);
    client.write(new, &[9; 4]);
    let inputs = client.set(&[("cache.must_alias_input", cache), ("new", new)]);
    let apart = client.set(&[("cache", other), ("old", old)]);
    assert_eq!(client.execute(model, inputs, apart), 2);
    assert!(client.emulated.last_reason().contains("must be the same tensor"), "{}", client.emulated.last_reason());
    assert_eq!(client.read(other), [0xA5; 8]);
    let together = client.set(&[("cache", cache), ("old", old)]);
    assert_eq!(client.execute(model, inputs, together), 0);
    assert_eq!(client.read(cache), [1, 2, 3, 4, 9, 9, 9, 9]);
    assert_eq!(client.read(old), [1, 2, 3, 4, 5, 6, 7, 8]);
    client.emulated.assert_no_violation();
    // Any other sharing of bytes is not the client's to choose.
    let confused = client.set(&[("cache", cache), ("old", cache)]);
    client.execute(model, inputs, confused);
    assert!(
        client.emulated.violations()[0].contains("output \"old\" overlaps \"cache"),
        "{:?}",
        client.emulated.violations()
    );
}

#[test]
fn sets_must_fit_the_model() {
    let client = Client::open();
    let model = client.load(&neff::emulated(IN_PLACE, false).unwrap(), 0).unwrap();
    let [cache, old] = [(); 2].map(|()| client.allocate(0, 8).unwrap());
    let new = client.allocate(0, 4).unwrap();
    let far = client.allocate(1, 4).unwrap();
    let alias = ("cache.must_alias_input", cache);
    let outputs = client.set(&[("cache", cache), ("old", old)]);
    for (members, reason) in [
        (vec![alias], "input \"new\" is not in the set"),
        (vec![alias, ("new", new), ("extra", new)], "the model has no input \"extra\""),
        (vec![alias, ("new", old)], "input \"new\": tensor of 8 bytes, needed 4"),
        (vec![alias, ("new", far)], "input \"new\": tensor on core 1, model on core 0"),
    ] {
        let inputs = client.set(&members);
        assert_eq!(client.execute(model, inputs, outputs), 2, "{reason}");
        assert_eq!(client.emulated.last_reason(), format!("nrt_execute: {reason}"));
    }
    client.emulated.assert_no_violation();
}

#[test]
fn injected_failures_spoil_what_a_failed_run_would() {
    let client = Client::open();
    let checked = Checked::open("matmul_fp8.channel");
    let bound = client.bind(&checked);
    let output = bound.tensors[checked.program.inputs().len()];
    let wanted = checked.run(&Options::default()).remove(0);
    let execute = || client.execute(bound.model, bound.sets[0], bound.sets[1]);
    // Skips one, fails twice, then is over.
    client.emulated.inject("nrt_execute", 1004, 1, 2);
    assert_eq!([(); 4].map(|()| execute()), [0, 1004, 1004, 0]);
    assert_eq!(client.read(output), wanted);
    // A full queue ran nothing; a hardware error ran and left rubbish.
    client.emulated.inject("nrt_execute", 7, 0, 1);
    assert_eq!((execute(), client.read(output) == wanted), (7, true));
    client.emulated.inject("nrt_execute", 1202, 0, 1);
    assert_eq!((execute(), client.read(output)), (1202, vec![0x5A; wanted.len()]));
    // A dead unit stays dead.
    client.emulated.inject("nrt_execute", 101, 0, 1);
    assert_eq!([execute(), execute()], [101, 101]);
    client.emulated.inject("nrt_unload", 1, 0, 1);
    assert_eq!(client.unload(bound.model), 1);
    assert_eq!(client.emulated.live(Kind::Models), 0, "unloaded whatever it returns");
    for (name, status) in [("nrt_tensor_allocate", 4), ("nrt_load", 9)] {
        client.emulated.inject(name, status, 0, u32::MAX);
    }
    assert_eq!(client.allocate(0, 8), Err(4));
    assert_eq!(client.load(&neff::emulated(&checked.json, true).unwrap(), 0), Err(9));
    client.emulated.inject("nrt_load", 0, 0, 0);
    assert!(client.load(&neff::emulated(&checked.json, true).unwrap(), 0).is_ok());
    client.emulated.assert_no_violation();
}

#[test]
fn a_panic_inside_is_a_status() {
    let client = Client::open();
    let bound = client.bind(&Checked::open("matmul_fp8.channel"));
    client.emulated.set_flags(flag::EXEC_PANICS);
    assert_eq!(client.execute(bound.model, bound.sets[0], bound.sets[1]), 1004);
    client.emulated.set_flags(0);
    assert_eq!(client.execute(bound.model, bound.sets[0], bound.sets[1]), 0);
    client.release(bound);
    client.close();
    client.emulated.assert_clean();
}

#[test]
fn versions_have_their_bugs() {
    let client = Client::open();
    let checked = Checked::open("matmul_mx.mxfp4");
    let model = client.load(&neff::emulated(&checked.json, true).unwrap(), 0).unwrap();
    let bytes = |port: &trn_kernels::trainium::emulator::Port| checked.program.tensors()[port.tensor].bytes() as u64;
    let [x, w, scale] = [0, 1, 2].map(|i| bytes(&checked.program.inputs()[i]));
    // x is bfloat16, w uint16 read as x4, its scale uint8, the output float32.
    let sizes = |client: &Client| client.infos(model)[..3].iter().map(|i| i.0).collect::<Vec<_>>();
    let dtypes = |client: &Client| client.infos(model).iter().map(|i| i.1).collect::<Vec<_>>();
    assert_eq!((sizes(&client), dtypes(&client)), (vec![x, w, scale], vec![0x6, 0x5, 0x3, 0xA]));
    client.emulated.set_version([2, 32, 31, 0]);
    assert_eq!((sizes(&client), dtypes(&client)), (vec![x, w / 4, scale], vec![0x6, 0x5, 0x3, 0xA]));
    client.emulated.set_version([2, 29, 40, 0]);
    assert_eq!(dtypes(&client), [3, 7, 5, 1]);
    client.emulated.set_version([2, 34, 10, 0]);
    client.emulated.set_flags(flag::X4_QUARTER_SIZE | flag::LEGACY_DTYPES);
    assert_eq!((sizes(&client), dtypes(&client)), (vec![x, w / 4, scale], vec![3, 7, 5, 1]));
    // 4 GiB and a bit loses its upper half before 2.30.50, and is too much for the core since.
    client.emulated.set_version([2, 29, 40, 0]);
    let small = client.allocate(0, (4 << 30) + 16).unwrap();
    assert_eq!(client.read(small).len(), 16);
    client.emulated.set_version([2, 30, 50, 0]);
    assert_eq!(client.allocate(0, (4 << 30) + 16), Err(4));
    // The instance's description grew at SDK 2.28.
    let mut info = [0u8; 32];
    // SAFETY: the buffer is as long as said.
    let mut ask = |len| unsafe { (client.raw.nrt_get_instance_info)(info.as_mut_ptr(), len) };
    assert_eq!([ask(32), ask(8)], [0, 0]);
    client.emulated.set_version([2, 29, 40, 0]);
    assert_eq!([ask(32), ask(8)], [2, 0]);
}

#[test]
fn closing_over_a_failed_model_is_told_and_starting_again_may_fail() {
    let client = Client::open();
    client.emulated.set_version([2, 30, 50, 0]);
    let bound = client.bind(&Checked::open("matmul_fp8.channel"));
    client.emulated.inject("nrt_execute", 1004, 0, 1);
    assert_eq!(client.execute(bound.model, bound.sets[0], bound.sets[1]), 1004);
    client.close();
    let [live, twice] = &client.emulated.violations()[..] else { panic!("{:?}", client.emulated.violations()) };
    assert_eq!(live, "nrt_close: called with 1 models, 6 tensors, 2 tensor sets alive");
    assert!(twice.contains("double free"), "{twice}");
    assert_eq!(client.init(), 0);
    assert_eq!(client.init(), 0, "a second time changes nothing");
    assert_eq!(client.emulated.violation_count(), 3, "but is not right");
    client.close();
    client.emulated.set_flags(flag::REINIT_AFTER_CLOSE_FAILS);
    assert_eq!(client.init(), 14);
}

#[test]
fn hostile_neffs_are_refused() {
    let client = Client::open();
    // Not compressed, so that changes reach the program.
    let good = neff::emulated(&Checked::open("matmul_fp8.channel").json, false).unwrap();
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = |limit: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % limit as u64) as usize
    };
    let mut refused = 0;
    for round in 0..300 {
        let mut neff = good.clone();
        for _ in 0..=round % 3 {
            neff[random(good.len())] = random(256) as u8;
        }
        match client.load(&neff, 0) {
            Ok(model) => assert_eq!(client.unload(model), 0),
            Err(status) => {
                assert!([2, 9, 10].contains(&status), "{status}: {}", client.emulated.last_reason());
                refused += 1;
            }
        }
    }
    assert!(refused > 100, "only {refused} refused");
    client.close();
    client.emulated.assert_clean();
}

#[test]
fn loads_that_cannot_be() {
    let client = Client::open();
    let good = neff::emulated(IN_PLACE, true).unwrap();
    let with = |at: usize, byte: u8| {
        let mut neff = good.clone();
        neff[at] = byte;
        neff
    };
    let cases: [(Vec<u8>, u32); 8] = [
        (vec![], 2),
        (good[..1023].to_vec(), 2),
        (good[..good.len() - 1].to_vec(), 2),
        (with(8, 1), 2),              // header_size
        (with(16, 1), 2),             // data_size
        (with(2, 1), 10),             // pkg_version
        (with(1030, !good[1030]), 0), // a byte of the gzip header that says nothing
        (with(1024, 0), 2),           // not gzip, and no tar either
    ];
    for (i, (neff, status)) in cases.into_iter().enumerate() {
        assert_eq!(client.load(&neff, 0).err().unwrap_or(0), status, "case {i}: {}", client.emulated.last_reason());
    }
    let mut real = good.clone();
    real[..8].copy_from_slice(&1u64.to_le_bytes());
    assert_eq!(client.load(&real, 0), Err(10));
    assert!(client.emulated.last_reason().contains("compiled for a NeuronCore"));
    client.emulated.set_chip(3);
    assert_eq!(client.load(&good, 0), Err(6), "a program for another chip");
    client.emulated.set_chip(2);
    assert_eq!([client.load(&good, 2), client.load(&good, -2)], [Err(2); 2]);
    let mut greedy = good.clone();
    greedy[476] = 3;
    assert_eq!(client.load(&greedy, 0), Err(9), "more cores than there are");
    client.emulated.set_flags(flag::AUTO_VNC);
    let cores: Vec<u32> = (0..3)
        .map(|_| {
            let (model, mut core, mut written) = (client.load(&good, -1).unwrap(), 9, 0);
            // SAFETY: four bytes are writable, and so is the place of the size.
            assert_eq!(unsafe { (client.raw.nrt_get_model_info)(model, &mut core, 4, &mut written) }, 0);
            core
        })
        .collect();
    assert_eq!(cores, [1, 0, 1]);
    client.emulated.assert_no_violation();
}

#[test]
fn executions_of_threads_overlap() {
    let client = Client::open();
    let checked = Checked::open("matmul_fp8.channel");
    let bounds: Vec<Bound> = (0..4).map(|_| client.bind(&checked)).collect();
    client.emulated.set_flags(flag::SLOW_EXEC);
    client.emulated.set_delay_ms(400);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for bound in &bounds {
            // Handles are numbers; that they may cross threads is what is tested.
            let handles = [bound.model, bound.sets[0], bound.sets[1]].map(|h| h.addr());
            let client = &client;
            scope.spawn(move || {
                let [model, inputs, outputs] = handles.map(std::ptr::without_provenance_mut);
                assert_eq!(client.execute(model, inputs, outputs), 0);
            });
        }
    });
    assert!(start.elapsed().as_millis() < 1600, "four executions of 400 ms ran one after the other");
    // What an execution uses must not go while it runs.
    std::thread::scope(|scope| {
        let handles = [bounds[0].model, bounds[0].sets[0], bounds[0].sets[1]].map(|h| h.addr());
        let client = &client;
        scope.spawn(move || {
            let [model, inputs, outputs] = handles.map(std::ptr::without_provenance_mut);
            client.execute(model, inputs, outputs);
        });
        while client.emulated.live(Kind::Executions) == 0 {
            std::thread::yield_now();
        }
        client.unload(bounds[0].model);
    });
    assert_eq!(client.emulated.violations(), ["nrt_unload: the model is unloaded while an execution uses it"]);
}

#[test]
fn copies_are_strangers() {
    let (one, two) = (Client::open(), Client::open());
    let tensor = one.allocate(0, 8).unwrap();
    assert_eq!(two.write(tensor, &[1]), 3);
    assert_eq!(two.emulated.violations(), ["nrt_tensor_write: tensor: a handle of another copy of this library"]);
    assert_eq!((one.emulated.live(Kind::Tensors), two.emulated.live(Kind::Tensors)), (1, 0));
    one.emulated.reset();
    assert_eq!(one.emulated.live(Kind::Everything), 0);
    assert_eq!(one.init(), 0);
    assert_eq!(one.write(tensor, &[1]), 3, "stale after a reset");
}

#[test]
fn memory_is_metered() {
    let client = Client::open();
    client.emulated.set_memory(100);
    let first = client.allocate(0, 60).unwrap();
    assert_eq!(client.allocate(0, 60), Err(4));
    let mut slice = null_mut();
    // SAFETY: no name, and the place is writable.
    assert_eq!(unsafe { (client.raw.nrt_tensor_allocate_slice)(first, 8, 8, std::ptr::null(), &mut slice) }, 0);
    client.write(slice, &[7; 8]);
    assert_eq!(client.read(first)[..17], [[0xA5; 8], [7; 8]].concat().into_iter().chain([0xA5]).collect::<Vec<u8>>());
    client.free(first);
    assert_eq!(client.allocate(0, 60), Err(4), "the slice still holds the storage");
    assert_eq!(client.read(slice), [7; 8]);
    client.free(slice);
    let again = client.allocate(0, 60).unwrap();
    client.free(again);
    client.close();
    client.emulated.assert_clean();
}

#[test]
fn missing_symbols_are_missing() {
    let client = Emulated::without(&["nrt_tensor_memset", "nrt_get_instance_info"]);
    // SAFETY: only asks whether the symbols are there; the file is one that is loaded already.
    let library = unsafe { libloading::os::unix::Library::new(client.path()) }.unwrap();
    let (required, optional) = client.symbols();
    assert_eq!((required.len(), optional.len()), (23, 10));
    for name in required.iter().chain(&optional) {
        // SAFETY: the symbol is not used.
        let found = unsafe { library.get::<*const ()>(name.as_str()) }.is_ok();
        assert_eq!(found, !["nrt_tensor_memset", "nrt_get_instance_info"].contains(&name.as_str()), "{name}");
    }
}

/// Settings of the environment are read by a process of its own: this test, run again.
#[test]
fn foreign_clients_use_the_environment() {
    if std::env::var_os("EMUNRT_VERSION").is_some() {
        let client = Client::new();
        let (mut version, mut cores) = ([0u8; 224], 0);
        // SAFETY: the buffer is as long as said.
        assert_eq!(unsafe { (client.raw.nrt_get_version)(version.as_mut_ptr(), 224) }, 0);
        // SAFETY: the place is writable.
        assert_eq!(unsafe { (client.raw.nrt_get_visible_nc_count)(&mut cores) }, 0);
        assert_eq!((version[8], version[16], cores), (31, 24, 3));
        client.allocate(0, 1).unwrap_err();
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "foreign_clients_use_the_environment", "--nocapture"]);
    child.env("EMUNRT_VERSION", "2.31.24").env("EMUNRT_CORES", "16:8").env("NEURON_RT_VISIBLE_CORES", "2-4");
    let output = child.env("EMUNRT_LOG", &trace).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let trace = std::fs::read_to_string(trace).unwrap();
    assert!(trace.contains(" nrt_get_version 0\n"), "{trace}");
    assert!(trace.contains(" nrt_tensor_allocate 13 NRT_UNINITIALIZED: called before nrt_init\n"), "{trace}");
}
