//! Paged caches of random codes: every quantized format, any page order.
#![forbid(unsafe_code)]
#![allow(unreachable_pub)]

use crate::Outputs;
use crate::random::Rng;
use half::bf16;
use trn_kernels::attention::oracle::{self, Reference};
use trn_kernels::attention::{AttentionSpec, Queries, plan_decode};
use trn_kernels::kv::{KvFormat, KvPlane, KvScale, KvShape, PageTable, PagedKv};
use trn_kernels::num::Fp8;
use trn_kernels::{Cpu, HeadsRef, Parallelism, Workspace};

/// A paged cache of random codes.
pub struct Paged {
    pub shape: KvShape,
    pub k: (Vec<u8>, Vec<u8>),
    pub v: (Vec<u8>, Vec<u8>),
    pub table: PageTable,
    q: Vec<bf16>,
    pub spec: AttentionSpec,
    pub sinks: Vec<f32>,
}

const PAGED_LEN: usize = 75;

impl Paged {
    pub fn new(format: KvFormat) -> Paged {
        let mut rng = Rng(21);
        let shape = KvShape { format, num_pages: 12, page_size: 8, num_kv_heads: 2, head_dim_qk: 64, head_dim_vo: 64 };
        let vectors = 12 * 8 * 2;
        let mut plane = || match format {
            KvFormat::Mxfp4 | KvFormat::Nvfp4 => {
                let scale =
                    |rng: &mut Rng| if format == KvFormat::Mxfp4 { 124 + rng.below(5) } else { 0x30 + rng.below(16) };
                let codes = (0..vectors * 32).map(|_| rng.next() as u8).collect();
                (codes, (0..vectors * 64 / format.block()).map(|_| scale(&mut rng) as u8).collect())
            }
            // Finite codes of both signs up to 1.875.
            _ => {
                let scales = if format.block() == 32 { vectors * 2 } else { 0 };
                let codes = (0..vectors * 64).map(|_| (rng.next() as u8 & 0x80) | rng.below(0x40) as u8).collect();
                (codes, (0..scales).map(|_| 124 + rng.below(5) as u8).collect())
            }
        };
        let (k, v) = (plane(), plane());
        let spec = AttentionSpec { window_left: Some(40), ..AttentionSpec::new(4, 2, 64) };
        Paged {
            shape,
            k,
            v,
            table: PageTable::new(8, vec![0, 10], vec![3, 0, 11, 5, 7, 2, 1, 9, 8, 4], vec![PAGED_LEN - 72]).unwrap(),
            q: rng.wide(4 * 64, 0..=0).into_iter().map(bf16::from_f32).collect(),
            spec,
            sinks: vec![2.0, 3.0, 1.0, 2.5],
        }
    }

    pub fn scales(&self) -> (KvScale<'static>, KvScale<'static>) {
        if self.shape.format.has_scale() {
            (KvScale::Tensor(0.75), KvScale::Tensor(1.5))
        } else {
            (KvScale::One, KvScale::One)
        }
    }

    pub fn view(&self) -> PagedKv<'_> {
        let (k, v) = self.scales();
        self.view_with(k, v)
    }

    pub fn view_with(&self, k: KvScale<'static>, v: KvScale<'static>) -> PagedKv<'_> {
        PagedKv::new(
            self.shape,
            KvPlane { codes: &self.k.0, block_scales: &self.k.1, scale: k },
            KvPlane { codes: &self.v.0, block_scales: &self.v.1, scale: v },
        )
        .unwrap()
    }

    pub fn heads(&self) -> HeadsRef<'_, bf16> {
        HeadsRef::new(&self.q, 1, 4, 64).unwrap()
    }

    pub fn decode_with(&self, spec: &AttentionSpec, kv: &PagedKv<'_>, sinks: Option<&[f32]>) -> Outputs {
        let plan = plan_decode(spec, kv, &self.table).unwrap();
        Outputs::of(spec, 1, |o| Cpu::detect().decode(&plan, self.heads(), kv, sinks, o, &mut Workspace::new()))
    }

    pub fn decode(&self) -> Outputs {
        self.decode_with(&self.spec, &self.view(), Some(&self.sinks))
    }

    pub fn oracle(&self) -> Reference {
        let queries = Queries { q: self.heads(), indptr: &[0, 1], sinks: Some(&self.sinks) };
        oracle::paged(&self.spec, queries, &self.view(), &self.table).unwrap()
    }
}

const QUANTIZED: [KvFormat; 7] = [
    KvFormat::Fp8(Fp8::E4M3Fn),
    KvFormat::Fp8(Fp8::E4M3Ieee),
    KvFormat::Fp8(Fp8::E5M2),
    KvFormat::Fp8(Fp8::E3M4),
    KvFormat::Mxfp8(Fp8::E4M3Fn),
    KvFormat::Mxfp4,
    KvFormat::Nvfp4,
];

#[test]
fn quantized_caches_within_the_bound() {
    for format in QUANTIZED {
        let paged = Paged::new(format);
        assert!(paged.decode().within(&paged.oracle()), "{format:?}");
    }
}

/// The same tokens in other pages.
#[test]
fn page_order_does_not_matter() {
    let paged = Paged::new(KvFormat::Mxfp4);
    let mut moved = Paged::new(KvFormat::Mxfp4);
    let pages: Vec<u32> = vec![6, 10, 4, 8, 9, 1, 2, 7, 5, 11];
    for (&from, &to) in paged.table.indices().iter().zip(&pages) {
        for (to_plane, from_plane) in [
            (&mut moved.k.0, &paged.k.0),
            (&mut moved.k.1, &paged.k.1),
            (&mut moved.v.0, &paged.v.0),
            (&mut moved.v.1, &paged.v.1),
        ] {
            let page = from_plane.len() / 12;
            let bytes = &from_plane[from as usize * page..(from as usize + 1) * page];
            to_plane[to as usize * page..(to as usize + 1) * page].copy_from_slice(bytes);
        }
    }
    moved.table = PageTable::new(8, vec![0, 10], pages, vec![PAGED_LEN - 72]).unwrap();
    assert_eq!(paged.decode().bits(), moved.decode().bits());
}

/// Pages that no table names and slots past the last token may hold anything.
#[test]
fn unused_slots_are_not_read() {
    for format in QUANTIZED {
        let clean = Paged::new(format);
        let mut dirty = Paged::new(format);
        let last = *clean.table.indices().last().unwrap() as usize;
        for plane in [&mut dirty.k.0, &mut dirty.k.1, &mut dirty.v.0, &mut dirty.v.1] {
            let page = plane.len() / 12;
            let slot = page / 8;
            // 0xFF: NaN in every FP8 and scale format, -6 in FP4.
            for unused in [6, 10] {
                plane[unused * page..(unused + 1) * page].fill(0xFF);
            }
            plane[last * page + clean.table.last_page_len()[0] * slot..(last + 1) * page].fill(0xFF);
        }
        assert_eq!(clean.decode().bits(), dirty.decode().bits(), "{format:?}");
        // The poison is one: where it is read it shows.
        dirty.k.0.fill(0xFF);
        dirty.k.1.fill(0xFF);
        assert_ne!(clean.decode().bits(), dirty.decode().bits(), "{format:?}");
    }
}

#[test]
fn threads_decode_the_same_bits() {
    for format in QUANTIZED {
        let paged = Paged::new(format);
        let (kv, want) = (paged.view(), paged.decode().bits());
        let plan = plan_decode(&paged.spec, &kv, &paged.table).unwrap();
        for threads in [2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let cpu = Cpu::detect().with_parallelism(Parallelism::Pool(&pool));
            let got = Outputs::of(&paged.spec, 1, |o| {
                cpu.decode(&plan, paged.heads(), &kv, Some(&paged.sinks), o, &mut Workspace::new())
            });
            assert_eq!(got.bits(), want, "{format:?}, {threads} threads");
        }
    }
}
