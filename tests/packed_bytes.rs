//! Packed weights written and read back: the same matrix; anything else is refused by name.

#[path = "support/random.rs"]
mod random;

use random::{RandomMatrix, Rng, SCHEMES};
use trn_kernels::matmul::{MatmulOptions, PackedLayout, PackedMatrix};
use trn_kernels::quant::Scheme;
use trn_kernels::{Cpu, Error, MatMut, MatRef, Workspace};

/// Bytes that begin `offset` after a multiple of 64, as a map of a file or of a part of one would.
struct Map(Vec<u8>, usize, usize);

impl Map {
    fn new(bytes: &[u8], offset: usize) -> Map {
        let mut memory = vec![0; bytes.len() + 128];
        let start = memory.as_ptr().align_offset(64) + offset;
        memory[start..start + bytes.len()].copy_from_slice(bytes);
        Map(memory, start, bytes.len())
    }
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        &self.0[self.1..self.1 + self.2]
    }
}

fn read(bytes: &[u8]) -> Result<PackedMatrix, Error> {
    PackedMatrix::from_bytes(Map::new(bytes, 0))
}

fn written(scheme: Scheme, n: usize, k: usize) -> (PackedMatrix, Vec<u8>) {
    let w = RandomMatrix::new(&mut Rng(1), scheme, n, k, 4);
    let packed = Cpu::detect().pack(&w.view()).unwrap();
    let mut bytes = vec![];
    packed.write_to(&mut bytes).unwrap();
    assert_eq!(bytes.len(), packed.written_bytes());
    (packed, bytes)
}

#[test]
fn what_is_read_is_what_was_written() {
    let cpu = Cpu::detect();
    for scheme in SCHEMES {
        for (n, k) in [(40, 288), (1, 32), (0, 64), (5, 0)] {
            let (packed, bytes) = written(scheme, n, k);
            let back = read(&bytes).unwrap();
            assert_eq!((back.scheme(), back.n(), back.k(), back.bytes()), (scheme, n, k, packed.bytes()));
            assert_eq!((back.layout(), back.is_finite()), (packed.layout(), packed.is_finite()));
            let mut again = vec![];
            back.write_to(&mut again).unwrap();
            assert_eq!(again, bytes, "{scheme:?}");
            let x = Rng(2).wide(3 * k, -2..=2);
            let y = |w: &PackedMatrix| {
                let mut y = vec![0.0f32; 3 * n];
                let (x, out) = (MatRef::new(&x, 3, k).unwrap(), MatMut::new(&mut y, 3, n).unwrap());
                cpu.matmul(x, w, out, &MatmulOptions::default(), &mut Workspace::new()).unwrap();
                y
            };
            assert_eq!(y(&packed), y(&back.clone()), "{scheme:?}");
        }
    }
}

#[test]
fn refusals() {
    let (packed, bytes) = written(Scheme::Mxfp4, 20, 160);
    assert_eq!(
        packed.layout().to_string(),
        "packed layout v2: Mxfp4 [20, 160] in 2 panels of 16 rows, 5 steps of 32, 2816 bytes"
    );
    let text = |bytes: &[u8]| read(bytes).unwrap_err().to_string();
    for len in [0, 7, 127] {
        assert_eq!(text(&bytes[..len]), format!("packed bytes: the slice has {len} elements, its extents need 128"));
    }
    let needed = bytes.len();
    for len in [128, needed - 1, needed + 4] {
        let mut cut = bytes.clone();
        cut.resize(len, 0);
        assert_eq!(text(&cut), format!("packed bytes: the slice has {len} elements, its extents need {needed}"));
    }
    let with = |at: usize, byte: u8| {
        let mut changed = bytes.clone();
        changed[at] ^= byte;
        text(&changed)
    };
    assert!(with(0, 1).ends_with("needed a packed matrix, which begins with TRNKPACK"));
    assert_eq!(
        with(8, PackedLayout::VERSION as u8 ^ 1),
        "packed bytes[8]: got layout version 1, needed layout version 2: pack the weights again"
    );
    assert_eq!(with(48, 1), "packed bytes[96]: got another checksum, needed a header as it was written");
    assert_eq!(with(128 + 700, 16), "packed bytes[88]: got another checksum, needed contents as they were written");
    for offset in [1, 4, 16, 32] {
        let e = PackedMatrix::from_bytes(Map::new(&bytes, offset)).unwrap_err().to_string();
        assert_eq!(
            e,
            format!(
                "packed bytes[0]: got an address of {offset} modulo 64, needed bytes that begin at a multiple of 64"
            )
        );
    }
}

/// One changed bit anywhere is noticed (the header's last 24 bytes are filling).
#[test]
fn every_bit_counts() {
    let (_, bytes) = written(Scheme::Fp8Blockwise { element: trn_kernels::num::Fp8::E4M3Fn, n: 24, k: 64 }, 17, 64);
    assert!(read(&bytes).is_ok());
    for at in (0..104).chain(128..bytes.len()) {
        for bit in [0, 3, 7] {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            assert!(read(&changed).is_err(), "byte {at}, bit {bit}");
        }
    }
}

/// The promise of the layout at sizes that models have.
#[test]
fn packed_bytes_are_hardly_more_than_source_bytes() {
    for (n, k) in [(2880, 2880), (4096, 4096), (5760, 2880), (14336, 4096), (160, 14336)] {
        let layout = PackedLayout::new(Scheme::Mxfp4, n, k).unwrap();
        let source = n * k / 2 + n * k / 32;
        assert!(layout.bytes() as f64 <= 1.02 * source as f64, "{layout} for {source}");
    }
}
