//! Packed weights written and read back: the same matrix; anything else is refused by name.

#[path = "support/packed_file.rs"]
mod packed_file;
#[path = "support/random.rs"]
mod random;

use packed_file::{CONTENTS_SUM, HEADER, Map, checksum, repair, set};
use random::{RandomMatrix, Rng, SCHEMES};
use trn_kernels::matmul::{MatmulOptions, PackedLayout, PackedMatrix};
use trn_kernels::num::Fp8;
use trn_kernels::quant::Scheme;
use trn_kernels::{Cpu, Error, MatMut, MatRef, Workspace};

fn read(bytes: &[u8]) -> Result<PackedMatrix, Error> {
    PackedMatrix::from_bytes(Map::new(bytes, 0))
}

fn bytes_of(packed: &PackedMatrix) -> Vec<u8> {
    let mut bytes = vec![];
    packed.write_to(&mut bytes).unwrap();
    assert_eq!(bytes.len(), packed.written_bytes());
    bytes
}

fn written(scheme: Scheme, n: usize, k: usize) -> (PackedMatrix, Vec<u8>) {
    let w = RandomMatrix::new(&mut Rng(1), scheme, n, k, 4);
    let packed = Cpu::detect().pack(&w.view()).unwrap();
    let bytes = bytes_of(&packed);
    (packed, bytes)
}

/// What decides which shortcuts kernels take.
fn facts(packed: &PackedMatrix) -> String {
    let text = format!("{packed:?}");
    text[text.find("facts: ").unwrap()..].to_string()
}

/// Bits of a product of three rows.
fn product(packed: &PackedMatrix) -> Vec<u32> {
    let (n, k) = (packed.n(), packed.k());
    let x = Rng(2).wide(3 * k, -2..=2);
    let mut y = vec![0.0f32; 3 * n];
    let (x, out) = (MatRef::new(&x, 3, k).unwrap(), MatMut::new(&mut y, 3, n).unwrap());
    Cpu::detect().matmul(x, packed, out, &MatmulOptions::default(), &mut Workspace::new()).unwrap();
    y.iter().map(|y| if y.is_nan() { f32::NAN.to_bits() } else { y.to_bits() }).collect()
}

/// Written and read: the same facts, found anew, the same bytes, the same products.
fn round_trip(packed: &PackedMatrix) -> PackedMatrix {
    let bytes = bytes_of(packed);
    let back = read(&bytes).unwrap();
    assert_eq!((back.layout(), back.bytes()), (packed.layout(), packed.bytes()));
    assert_eq!((facts(&back), back.is_finite()), (facts(packed), packed.is_finite()));
    assert_eq!(bytes_of(&back), bytes);
    assert_eq!(product(&back.clone()), product(packed));
    back
}

#[test]
fn what_is_read_is_what_was_written() {
    for scheme in SCHEMES {
        for (n, k) in [(40, 288), (1, 32), (0, 64), (5, 0)] {
            assert!(round_trip(&written(scheme, n, k).0).is_finite(), "{scheme:?}");
        }
    }
    // Rows and columns that fill no step.
    for scheme in [Scheme::Bf16, Scheme::Fp8PerTensor(Fp8::E4M3Fn), Scheme::Fp8PerChannel(Fp8::E3M4)] {
        for (n, k) in [(17, 33), (16, 61), (3, 1)] {
            round_trip(&written(scheme, n, k).0);
        }
    }
    round_trip(&written(Scheme::Nvfp4, 19, 80).0);
}

/// Packing and reading find the same in all that weights can hold.
#[test]
fn facts_are_those_of_packing() {
    let (n, k) = (21, 224);
    for scheme in SCHEMES {
        let mut kinds = std::collections::BTreeSet::new();
        let mut check = |change: &dyn Fn(&mut RandomMatrix)| {
            let mut w = RandomMatrix::new(&mut Rng(3), scheme, n, k, 4);
            change(&mut w);
            let packed = Cpu::detect().pack(&w.view()).unwrap();
            kinds.insert(facts(&round_trip(&packed)));
            packed.is_finite()
        };
        let wide = scheme == Scheme::Bf16;
        let largest_scale = if scheme == Scheme::Nvfp4 { 0x7F } else { 0xFF };
        assert!(check(&|_| {}));
        // All codes, all scales.
        let all_codes = |w: &mut RandomMatrix| {
            for (i, code) in w.codes.iter_mut().enumerate() {
                *code = if wide && i % 2 == 1 { i / 2 } else { i } as u8;
            }
        };
        assert_eq!(check(&all_codes), scheme.bits() == 4);
        check(&|w| w.scales.iter_mut().enumerate().for_each(|(i, s)| *s = i as u8 & largest_scale));
        // One code that is no number, or as large as any, first and last.
        for at in [0, n * k - 1] {
            let finite = check(&|w| match wide {
                true => w.codes[2 * at..][..2].copy_from_slice(&[0xC0, 0x7F]),
                false => w.codes[at / if scheme.bits() == 4 { 2 } else { 1 }] = 0xFF,
            });
            assert_eq!(finite, scheme.bits() == 4);
        }
        if wide {
            // Infinity; subnormals, packed as zeros; all of them.
            assert!(!check(&|w| w.codes[10..12].copy_from_slice(&[0x80, 0xFF])));
            assert!(check(&|w| w.codes[10..12].copy_from_slice(&[0x7F, 0x80])));
            assert!(check(&|w| w
                .codes
                .iter_mut()
                .enumerate()
                .for_each(|(i, c)| *c = if i % 2 == 1 { 0 } else { 0x7F })));
        }
        // Zeros, under any scale.
        check(&|w| w.codes.fill(0));
        for scale in (0..=largest_scale).step_by(127) {
            let block = scheme.block() * scheme.bits() / 8;
            let zeros_of = |w: &mut RandomMatrix, odd: bool| {
                for (i, s) in w.scales.iter_mut().enumerate().filter(|(i, _)| !odd || i % 2 == 1) {
                    *s = scale;
                    w.codes[i * block..][..block].fill(0);
                }
            };
            let finite = scheme.block() == 1 || scale < largest_scale;
            assert_eq!(check(&|w| zeros_of(w, false)), finite, "{scheme:?}, scale {scale}");
            assert_eq!(check(&|w| zeros_of(w, true)), finite, "{scheme:?}, scale {scale}");
            // The same scales over numbers.
            check(&|w| w.scales.iter_mut().for_each(|s| *s = scale));
            check(&|w| w.scales.iter_mut().take(1).for_each(|s| *s = scale));
        }
        assert!(kinds.len() > 1, "{scheme:?}: {kinds:?}");
    }
}

#[test]
fn refusals() {
    let (packed, bytes) = written(Scheme::Mxfp4, 20, 160);
    assert_eq!(
        packed.layout().to_string(),
        "packed layout v3: Mxfp4 [20, 160] in 2 panels of 16 rows, 5 steps of 32, 2816 bytes"
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
    assert_eq!(
        with(0, 1),
        "packed bytes[0]: got [55, 52, 4e, 4b, 50, 41, 43, 4b], needed a packed matrix, which begins with TRNKPACK"
    );
    for old in [1, 2] {
        assert_eq!(
            with(8, PackedLayout::VERSION as u8 ^ old),
            format!("packed bytes[8]: got layout version {old}, needed layout version 3: pack the weights again")
        );
    }
    assert_eq!(with(48, 1), "packed bytes[120]: got another checksum, needed a header as it was written");
    assert_eq!(with(128 + 700, 16), "packed bytes[72]: got another checksum, needed contents as they were written");
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

/// One changed bit anywhere is noticed, the header's filling included.
#[test]
fn every_bit_counts() {
    let (_, bytes) = written(Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 24, k: 64 }, 17, 64);
    assert!(read(&bytes).is_ok());
    for at in 0..bytes.len() {
        for bit in [0, 3, 7] {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            assert!(read(&changed).is_err(), "byte {at}, bit {bit}");
        }
    }
}

/// Two changed bits that once cancelled: the top bit of a word and bit 28 of the word 64 bytes later.
#[test]
fn two_bits_count() {
    let (_, bytes) = written(Scheme::Mxfp4, 16, 128);
    for at in (0..128).step_by(8) {
        let mut changed = bytes.clone();
        changed[HEADER + at + 7] ^= 0x80;
        changed[HEADER + at + 64 + 3] ^= 0x10;
        let e = read(&changed).unwrap_err().to_string();
        assert_eq!(e, "packed bytes[72]: got another checksum, needed contents as they were written");
    }
}

/// What a file that someone made is refused with: fields as given, checksums right.
fn forged(scheme: Scheme, (n, k): (usize, usize), change: impl FnOnce(&mut Vec<u8>)) -> Result<PackedMatrix, Error> {
    let (_, mut bytes) = written(scheme, n, k);
    assert_eq!(checksum(&bytes[HEADER..]).to_le_bytes(), bytes[CONTENTS_SUM..][..8]);
    change(&mut bytes);
    repair(&mut bytes);
    read(&bytes)
}

const TILES: Scheme = Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 24, k: 64 };
const TENSOR: Scheme = Scheme::Fp8PerTensor(Fp8::E4M3Fn);

#[test]
fn forged_headers() {
    let header = |scheme, shape, fields: &[(usize, u64)]| {
        let set_all = |file: &mut Vec<u8>| fields.iter().for_each(|(at, value)| set(file, *at, *value));
        forged(scheme, shape, set_all).unwrap_err().to_string()
    };
    assert!(forged(TENSOR, (17, 64), |_| {}).is_ok());
    // The scheme: kind, element, tile n, tile k.
    let unknown = "packed bytes[16]: got an unknown scheme, needed a scheme of this layout version";
    for fields in [
        &[(16, 7)][..],
        &[(16, u64::MAX)],
        &[(24, 4)],
        &[(24, u64::MAX)],
        &[(32, 1)],
        &[(40, 1)],
        &[(16, 1), (24, 1)],
        &[(16, 6), (40, 64)],
        &[(16, 6), (32, 64)],
    ] {
        assert_eq!(header(TENSOR, (17, 64), fields), unknown, "{fields:?}");
    }
    // Extents.
    for (scheme, of) in [(Scheme::Mxfp4, 32), (Scheme::Mxfp8(Fp8::E5M2), 32), (Scheme::Nvfp4, 16)] {
        let text = header(scheme, (16, 64), &[(56, 72)]);
        assert_eq!(text, format!("packed bytes: axis k is 72, needed a multiple of {of}"));
    }
    assert_eq!(
        header(TILES, (17, 64), &[(40, 48)]),
        "weights with scale tiles of 48 along k is not supported: the canonical sum takes steps of 32: tiles must be a multiple of it"
    );
    let overflow = "packed weights: the product of its extents does not fit in usize or in memory";
    for (n, k) in [(u64::MAX, 64), (17, u64::MAX), (1 << 40, 1 << 40), (u64::MAX / 64, 64)] {
        assert_eq!(header(TENSOR, (17, 64), &[(48, n), (56, k)]), overflow, "[{n}, {k}]");
    }
    let one_by_one = [(32, 1), (40, 32), (48, 1 << 52), (56, 1 << 14)];
    assert_eq!(header(TILES, (17, 64), &one_by_one), overflow);
    // Without columns no codes bound the rows, scales do.
    assert_eq!(
        header(Scheme::Fp8PerChannel(Fp8::E3M4), (17, 0), &[(48, u64::MAX), (64, u64::MAX)]),
        "packed bytes: the product of its extents does not fit in usize or in memory"
    );
    assert_eq!(
        header(Scheme::Fp8PerChannel(Fp8::E3M4), (17, 0), &[(48, 1 << 50), (64, 1 << 50)]),
        format!("packed bytes: the slice has {} elements, its extents need {}", 128 + 17 * 4, 128u64 + (4 << 50))
    );
    // The length that extents need.
    for (n, k, needed) in [(33, 64, 128 + 3 * 1024 + 4), (17, 65, 128 + 2 * 3 * 512 + 4), (16, 64, 128 + 1024 + 4)] {
        let text = header(TENSOR, (17, 64), &[(48, n), (56, k)]);
        assert_eq!(text, format!("packed bytes: the slice has 2180 elements, its extents need {needed}"));
    }
    // How many f32 scales there are is written too.
    for (scheme, needed) in [(TENSOR, 1), (Scheme::Mxfp4, 1), (Scheme::Fp8PerChannel(Fp8::E3M4), 17), (TILES, 1)] {
        for got in [0, 2, u64::MAX] {
            let text = header(scheme, (17, 64), &[(64, got)]);
            let expected =
                format!("f32 scales of packed bytes: the slice has {got} elements, its extents need {needed}");
            assert_eq!(text, expected);
        }
    }
    for version in [0, 1, 2, 4, 1 << 32 | 3] {
        let text = header(TENSOR, (17, 64), &[(8, version)]);
        let needed = "needed layout version 3: pack the weights again";
        assert_eq!(text, format!("packed bytes[8]: got layout version {version}, {needed}"));
    }
}

/// Files cut short or gone on with, checksums right.
#[test]
fn forged_lengths() {
    for len in [128, 2179, 2181, 2184, 2244] {
        let e = forged(TENSOR, (17, 64), |file| file.resize(len, 0)).unwrap_err().to_string();
        assert_eq!(e, format!("packed bytes: the slice has {len} elements, its extents need 2180"));
    }
}

#[test]
fn forged_contents() {
    let contents = |scheme, shape, at: usize, put: &[u8]| {
        forged(scheme, shape, |file| file[HEADER + at..][..put.len()].copy_from_slice(put)).unwrap_err().to_string()
    };
    // f32 scales stand behind the codes.
    for (bad, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        for (scheme, at) in [(TENSOR, 0), (TILES, 0), (Scheme::Fp8PerChannel(Fp8::E3M4), 16), (Scheme::Bf16, 0)] {
            let end = if scheme == Scheme::Bf16 { 4096 } else { 2048 };
            let text = contents(scheme, (17, 64), end + 4 * at, &bad.to_le_bytes());
            assert_eq!(text, format!("f32 scales of packed bytes[{at}]: got {name}, needed a finite scale"));
        }
    }
    assert_eq!(
        contents(Scheme::Bf16, (17, 64), 4096, &2.0f32.to_le_bytes()),
        "f32 scales of packed bytes[0]: got 2, needed 1, for the scheme has no f32 scale"
    );
    // Block scales: the last one of the second panel's second group.
    let group = 128 + 4 * 256;
    for code in [0x80, 0xFF] {
        let at = 3 * group + 128 - 1;
        assert_eq!(
            contents(Scheme::Nvfp4, (32, 256), at, &[code]),
            format!(
                "packed bytes[{}]: got block scale code {code:#04x}, needed an NVFP4 block scale without the sign bit",
                HEADER + at
            )
        );
    }
    // A block of zeros: row 3, all four steps of the first group.
    for (scheme, lines) in [(Scheme::Mxfp4, 4), (Scheme::Mxfp8(Fp8::E4M3Fn), 8)] {
        for code in [0, 126, 128, 254] {
            let e = forged(scheme, (16, 128), |file| {
                let (scales, codes) = file[HEADER..].split_at_mut(64);
                for line in codes.chunks_exact_mut(64).take(4 * lines) {
                    if lines == 4 {
                        line[12..16].fill(0x88);
                    } else {
                        [6, 7, 38, 39].into_iter().for_each(|at| line[at] = 0x80);
                    }
                }
                scales[..64].chunks_exact_mut(16).for_each(|scales| scales[3] = 127);
                scales[16 + 3] = code;
            });
            assert_eq!(
                e.unwrap_err().to_string(),
                format!(
                    "packed bytes[147]: got block scale code {code:#04x}, needed scale 1 (code 0x7f) where a block is zeros"
                )
            );
        }
    }
    for code in [1u16, 0x7F, 0x8001, 0x807F] {
        assert_eq!(
            contents(Scheme::Bf16, (32, 64), 2048 + 1000, &code.to_le_bytes()),
            "packed bytes[2176]: got a subnormal bf16, needed subnormals packed as zeros"
        );
    }
    // Row 17 of [17, 64]; column 33 of [16, 33], where a step of FP8 is 8 lines of 4 k and one of bf16 is 16 lines of 2.
    let past = |step| format!("packed bytes[{}]: got another value, needed zeros past n and k", HEADER + step);
    assert_eq!(contents(TENSOR, (17, 64), 1024 + 2, &[1]), past(1024));
    assert_eq!(contents(TENSOR, (17, 64), 1024 + 512 + 32 + 2, &[0x7F]), past(1024 + 512));
    assert_eq!(contents(TENSOR, (16, 33), 512 + 1, &[0x38]), past(512));
    assert_eq!(contents(TENSOR, (16, 33), 512 + 64, &[0x80]), past(512));
    assert_eq!(contents(Scheme::Bf16, (16, 33), 1024 + 2, &[0x80, 0x3F]), past(1024));
    assert_eq!(contents(Scheme::Mxfp4, (17, 128), 64 + 1024 + 64 + 4, &[1]), past(64 + 1024 + 64));
    assert_eq!(contents(Scheme::Mxfp4, (17, 128), 64 + 1024 + 1, &[255]), past(64 + 1024 + 64));
    let e = forged(Scheme::Nvfp4, (16, 16), |file| {
        file[HEADER + 16] = 0x38;
        file[HEADER + 64 + 128] = 1;
    });
    assert_eq!(e.unwrap_err().to_string(), past(64));
}

/// No field of a file makes what is not a number into one: what decides is found in the codes and scales.
#[test]
fn files_cannot_lie_about_what_they_hold() {
    let nan = f32::NAN.to_bits();
    for (scheme, at, put) in [
        (TENSOR, 0, &[0x7F][..]),
        (Scheme::Fp8PerChannel(Fp8::E5M2), 0, &[0x7E]),
        (Scheme::Mxfp8(Fp8::E4M3Fn), 64, &[0xFF]),
        (Scheme::Mxfp8(Fp8::E4M3Fn), 0, &[0xFF]),
        (Scheme::Mxfp4, 0, &[0xFF]),
        (Scheme::Nvfp4, 0, &[0x7F]),
        (Scheme::Bf16, 0, &[0xC0, 0x7F]),
    ] {
        // Where version 2 had its facts there are zeros now, which nobody reads.
        for said in [0, u64::MAX] {
            let lying = forged(scheme, (32, 128), |file| {
                file[HEADER + at..][..put.len()].copy_from_slice(put);
                [80, 88, 96].into_iter().for_each(|at| set(file, at, said));
            });
            let lying = lying.unwrap();
            assert!(!lying.is_finite(), "{scheme:?}");
            let y = product(&lying);
            assert!((0..3).all(|row| y[row * 32] == nan), "{scheme:?}: {y:x?}");
            assert!((0..3).all(|row| y[row * 32 + 1] != nan), "{scheme:?}: {y:x?}");
        }
    }
    // Scales so large or so small that shortcuts fail.
    for code in [0, 1, 252, 254] {
        let mut w = RandomMatrix::new(&mut Rng(1), Scheme::Mxfp4, 32, 128, 4);
        w.scales[2] = code;
        let packed = Cpu::detect().pack(&w.view()).unwrap();
        let made = forged(Scheme::Mxfp4, (32, 128), |file| file[HEADER + 2 * 16] = code).unwrap();
        assert_eq!((facts(&made), product(&made)), (facts(&packed), product(&packed)), "scale {code}");
        assert_ne!(facts(&made), facts(&written(Scheme::Mxfp4, 32, 128).0));
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
