//! What is measured: shapes, schemes, weights in enough copies to be cold, and the calls.
#![forbid(unsafe_code)]

use half::bf16;
use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;
use trn_kernels::cpu::limits::last_level_caches;
use trn_kernels::matmul::oracle::{self, OutputType};
use trn_kernels::matmul::{MatmulOptions, PackedExperts, PackedMatrix, RowSource};
use trn_kernels::num::Fp8;
use trn_kernels::quant::{GlobalScale, QuantizedMatrix, Scheme};
use trn_kernels::{Cpu, MatMut, MatRef, Workspace};

/// Largest extent that is taken: no model has a larger matrix, and `n * k` stays far from overflow.
const EXTENT: usize = 1 << 20;

/// A weight matrix's shape, `NxK`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) n: usize,
    pub(crate) k: usize,
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("got {text:?}, need NxK such as 4096x4096, each from 1 to {EXTENT}");
        let (n, k) = text.split_once('x').ok_or_else(wrong)?;
        let extent = |s: &str| s.parse().ok().filter(|v| (1..=EXTENT).contains(v)).ok_or_else(wrong);
        Ok(Shape { n: extent(n)?, k: extent(k)? })
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.n, self.k)
    }
}

/// Type of activations and outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Acts {
    Bf16,
    F32,
}

impl Acts {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Acts::Bf16 => "bf16",
            Acts::F32 => "f32",
        }
    }
}

/// Schemes by the names that the command line takes.
pub(crate) const SCHEMES: [(&str, Scheme); 7] = [
    ("mxfp4", Scheme::Mxfp4),
    ("nvfp4", Scheme::Nvfp4),
    ("mxfp8", Scheme::Mxfp8(Fp8::E4M3Fn)),
    ("fp8-tensor", Scheme::Fp8PerTensor(Fp8::E4M3Fn)),
    ("fp8-channel", Scheme::Fp8PerChannel(Fp8::E4M3Fn)),
    ("fp8-block", Scheme::Fp8Blockwise { element: Fp8::E4M3Fn, n: 128, k: 128 }),
    ("bf16", Scheme::Bf16),
];

/// The scheme of a name.
pub(crate) fn scheme(name: &str) -> Result<Scheme, String> {
    let found = SCHEMES.iter().find(|(known, _)| *known == name).map(|(_, scheme)| *scheme);
    found.ok_or_else(|| format!("got {name:?}, need one of {}", SCHEMES.map(|(known, _)| known).join(", ")))
}

/// The name of a scheme.
pub(crate) fn scheme_name(scheme: Scheme) -> &'static str {
    SCHEMES.iter().find(|(_, known)| *known == scheme).map_or("other", |(name, _)| name)
}

/// Refuses a shape whose k is no whole number of the scheme's blocks.
pub(crate) fn check_blocks(scheme: Scheme, shape: Shape) -> Result<(), String> {
    let (name, block) = (scheme_name(scheme), scheme.block());
    match shape.k.is_multiple_of(block) {
        true => Ok(()),
        false => Err(format!("--shapes: {shape}: k of {name} must be a multiple of {block}")),
    }
}

/// Bytes of a matrix, before it is made; slightly more than it will have.
pub(crate) fn estimated_bytes(scheme: Scheme, Shape { n, k }: Shape) -> f64 {
    (n * k) as f64 * (scheme.bits() as f64 + 0.5) / 8.0
}

/// A fixed sequence of random numbers (xorshift64): every run measures the same data.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Uniform in -1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn bytes(&mut self, count: usize, keep: u8) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count.next_multiple_of(8));
        while bytes.len() < count {
            bytes.extend(self.next().to_le_bytes().map(|b| b & keep));
        }
        bytes.truncate(count);
        bytes
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.unit()).collect()
    }
}

/// A random weight matrix as a checkpoint holds it. Every code is a number, and products of sums of a few thousand stay near 1.
#[derive(Clone)]
pub(crate) struct Weights {
    pub(crate) scheme: Scheme,
    pub(crate) shape: Shape,
    codes: Vec<u8>,
    block_scales: Vec<u8>,
    outer_scales: Vec<f32>,
}

impl Weights {
    pub(crate) fn random(scheme: Scheme, shape: Shape, seed: u64) -> Self {
        let (Shape { n, k }, mut random) = (shape, Random::new(seed));
        let codes = match scheme {
            Scheme::Bf16 => (0..n * k).flat_map(|_| bf16::from_f32(0.02 * random.unit()).to_le_bytes()).collect(),
            _ if scheme.bits() == 4 => random.bytes((n * k).div_ceil(2), 0xFF),
            // Without the top bit of the exponent no FP8 code is an infinity or a NaN.
            _ => random.bytes(n * k, 0xBF),
        };
        let block_scales = match scheme {
            // E8M0 2^-9 to 2^-6, E4M3 0.5 to 0.875.
            Scheme::Mxfp4 | Scheme::Mxfp8(_) => random.bytes(n * k.div_ceil(32), 3).iter().map(|b| 118 + b).collect(),
            Scheme::Nvfp4 => random.bytes(n * k.div_ceil(16), 3).iter().map(|b| 0x30 + 2 * b).collect(),
            _ => vec![],
        };
        let outer_scales = match scheme {
            Scheme::Fp8PerTensor(_) => 1,
            Scheme::Fp8PerChannel(_) => n,
            Scheme::Fp8Blockwise { n: rows, k: columns, .. } => n.div_ceil(rows) * k.div_ceil(columns),
            _ => 0,
        };
        let outer_scales = (0..outer_scales).map(|_| 0.02 + 0.005 * random.unit()).collect();
        Weights { scheme, shape, codes, block_scales, outer_scales }
    }

    /// The matrix; an error if its k is no whole number of blocks.
    pub(crate) fn view(&self) -> trn_kernels::Result<QuantizedMatrix<'_>> {
        let (Shape { n, k }, codes, scales) = (self.shape, &self.codes[..], &self.block_scales[..]);
        match self.scheme {
            Scheme::Bf16 => QuantizedMatrix::bf16(n, k, codes),
            Scheme::Mxfp4 => QuantizedMatrix::mxfp4(n, k, codes, scales),
            Scheme::Mxfp8(element) => QuantizedMatrix::mxfp8(element, n, k, codes, scales),
            Scheme::Nvfp4 => QuantizedMatrix::nvfp4(n, k, codes, scales, GlobalScale::multiplier(0.015625)),
            Scheme::Fp8PerTensor(element) => {
                QuantizedMatrix::fp8_per_tensor(element, n, k, codes, self.outer_scales[0])
            }
            Scheme::Fp8PerChannel(element) => {
                QuantizedMatrix::fp8_per_channel(element, n, k, codes, &self.outer_scales[..])
            }
            Scheme::Fp8Blockwise { element, n: rows, k: columns } => {
                QuantizedMatrix::fp8_blockwise(element, n, k, codes, &self.outer_scales[..], (rows, columns))
            }
        }
    }

    /// Codes, block scales, outer scales.
    pub(crate) fn parts(&self) -> [&[u8]; 3] {
        [&self.codes, &self.block_scales, bytemuck::cast_slice(&self.outer_scales)]
    }

    /// Bytes of codes and scales: what a call must read, however the kernel packs them.
    pub(crate) fn bytes(&self) -> usize {
        self.parts().map(<[u8]>::len).iter().sum()
    }
}

/// Values of either type.
pub(crate) enum Values {
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
}

impl Values {
    /// `count` values: random from `seed`, or zeros.
    pub(crate) fn new(acts: Acts, count: usize, seed: Option<u64>) -> Self {
        let values = seed.map_or_else(|| vec![0.0; count], |seed| Random::new(seed).floats(count));
        match acts {
            Acts::Bf16 => Values::Bf16(values.into_iter().map(bf16::from_f32).collect()),
            Acts::F32 => Values::F32(values),
        }
    }
}

/// A matrix in so many packed copies that together they exceed `cold` bytes: each call finds its weights in memory, not in a
/// cache.
pub(crate) struct Cold {
    pub(crate) weights: Weights,
    copies: Vec<PackedMatrix>,
}

impl Cold {
    pub(crate) fn new(cpu: &Cpu<'_>, weights: Weights, cold: usize) -> Result<Self, String> {
        let packed = weights.view().and_then(|view| cpu.pack(&view)).map_err(|e| e.to_string())?;
        let count = copies(weights.bytes(), cold);
        Ok(Cold { weights, copies: vec![packed; count] })
    }
}

/// Bytes that weights rotate over: as many as the read limit walks, so that neither finds more in a cache than the other. (Twice
/// the last-level caches would be too few: caches that keep some lines of a cycle they cannot hold would keep a third of it.)
pub(crate) fn cold_bytes() -> usize {
    last_level_caches().saturating_mul(4)
}

/// Copies of `bytes` that together exceed `cold`, two at least.
pub(crate) fn copies(bytes: usize, cold: usize) -> usize {
    (cold / bytes.max(1) + 1).max(2)
}

/// One dense matmul, call after call.
pub(crate) struct Dense<'a> {
    cold: &'a Cold,
    m: usize,
    next: usize,
    pub(crate) x: Values,
    pub(crate) y: Values,
    workspace: Workspace,
}

impl<'a> Dense<'a> {
    pub(crate) fn new(cold: &'a Cold, acts: Acts, m: usize) -> Self {
        let Shape { n, k } = cold.weights.shape;
        let (x, y) = (Values::new(acts, m * k, Some(1)), Values::new(acts, m * n, None));
        Dense { cold, m, next: 0, x, y, workspace: Workspace::new() }
    }

    pub(crate) fn call(&mut self, cpu: &Cpu<'_>) -> trn_kernels::Result<()> {
        let (Shape { n, k }, m) = (self.cold.weights.shape, self.m);
        let w = &self.cold.copies[self.next % self.cold.copies.len()];
        self.next += 1;
        let (options, ws) = (MatmulOptions::default(), &mut self.workspace);
        match (&self.x, &mut self.y) {
            (Values::Bf16(x), Values::Bf16(y)) => {
                cpu.matmul(MatRef::new(x, m, k)?, w, MatMut::new(y, m, n)?, &options, ws)
            }
            (Values::F32(x), Values::F32(y)) => {
                cpu.matmul(MatRef::new(x, m, k)?, w, MatMut::new(y, m, n)?, &options, ws)
            }
            _ => Ok(()), // x and y are of one type
        }
    }

    /// Bytes of weights that a call reads. Activations and outputs, which stay in caches from call to call, are not counted.
    pub(crate) fn bytes(&self) -> usize {
        self.cold.weights.bytes()
    }

    pub(crate) fn flops(&self) -> f64 {
        let Shape { n, k } = self.cold.weights.shape;
        2.0 * self.m as f64 * n as f64 * k as f64
    }

    /// Whether the last call was right: the ends of the first and the last row against the oracle.
    pub(crate) fn check(&self) -> Result<(), String> {
        let last = self.m - 1;
        check(&self.cold.weights, &self.x, &self.y, (0, 0))?;
        check(&self.cold.weights, &self.x, &self.y, (last, last))
    }
}

/// Row `y_row` of y against the oracle's product of row `x_row` of x, at the first and last columns.
fn check(w: &Weights, x: &Values, y: &Values, (x_row, y_row): (usize, usize)) -> Result<(), String> {
    let Shape { n, k } = w.shape;
    let view = w.view().map_err(|e| e.to_string())?;
    // Slices begin where a scale tile does.
    let tile = if let Scheme::Fp8Blockwise { n, .. } = w.scheme { n } else { 1 };
    for columns in [0..n.min(4), n.saturating_sub(4) / tile * tile..n] {
        let part = view.slice_n(columns.clone()).map_err(|e| e.to_string())?;
        let options = MatmulOptions::default();
        let expected = match x {
            Values::Bf16(x) => MatRef::new(&x[x_row * k..][..k], 1, k)
                .and_then(|x| oracle::matmul(x, &part, &options, &[], OutputType::Bf16)),
            Values::F32(x) => MatRef::new(&x[x_row * k..][..k], 1, k)
                .and_then(|x| oracle::matmul(x, &part, &options, &[], OutputType::F32)),
        };
        for (column, expected) in columns.zip(expected.map_err(|e| e.to_string())?) {
            let got = match y {
                Values::Bf16(y) => y[y_row * n + column].to_f64(),
                Values::F32(y) => f64::from(y[y_row * n + column]),
            };
            if !expected.admits(got) {
                return Err(format!(
                    "{} {}: output [{y_row}, {column}] is {got}, need {} within {}: the kernel is wrong, not measured",
                    scheme_name(w.scheme),
                    w.shape,
                    expected.value,
                    expected.bound
                ));
            }
        }
    }
    Ok(())
}

/// A stack of experts, in copies that together exceed the cold bytes. Experts hold the same numbers in memory of their own.
pub(crate) struct ColdExperts {
    weights: Weights,
    stacks: Vec<PackedExperts>,
}

impl ColdExperts {
    pub(crate) fn new(cpu: &Cpu<'_>, weights: Weights, experts: usize, cold: usize) -> Result<Self, String> {
        let packed = weights.view().and_then(|view| cpu.pack(&view)).map_err(|e| e.to_string())?;
        let stack = || PackedExperts::new(vec![packed.clone(); experts]).map_err(|e| e.to_string());
        let count = cold / weights.bytes().saturating_mul(experts).max(1) + 1;
        let stacks = (0..count).map(|_| stack()).collect::<Result<_, _>>()?;
        Ok(ColdExperts { weights, stacks })
    }
}

/// One gathered matmul, call after call. Routing is balanced: tokens draw their experts from a shuffled deck of all of them, so
/// that an expert comes again only after all others came, from call to call too.
pub(crate) struct Moe<'a> {
    cold: &'a ColdExperts,
    tokens: usize,
    top_k: usize,
    /// Which stack and which experts the calls use, in turn.
    routes: Vec<(usize, Vec<u32>)>,
    next: usize,
    x: Values,
    y: Values,
    workspace: Workspace,
}

impl<'a> Moe<'a> {
    pub(crate) fn new(cold: &'a ColdExperts, acts: Acts, tokens: usize, top_k: usize) -> Self {
        let Shape { n, k } = cold.weights.shape;
        let experts = cold.stacks.first().map_or(1, PackedExperts::len);
        let (mut random, mut deck) = (Random::new(7), vec![]);
        let mut route = || {
            let mut ids = Vec::with_capacity(tokens * top_k);
            for _ in 0..tokens {
                if deck.len() < top_k {
                    deck = (0..experts as u32).collect();
                    for i in (1..experts).rev() {
                        deck.swap(i, (random.next() % (i as u64 + 1)) as usize);
                    }
                }
                ids.extend(deck.drain(deck.len() - top_k..));
            }
            ids
        };
        let calls = (experts / (tokens * top_k)).max(1);
        let routes = (0..cold.stacks.len()).flat_map(|stack| std::iter::repeat_n(stack, calls));
        let routes = routes.map(|stack| (stack, route())).collect();
        let (x, y) = (Values::new(acts, tokens * k, Some(1)), Values::new(acts, tokens * top_k * n, None));
        Moe { cold, tokens, top_k, routes, next: 0, x, y, workspace: Workspace::new() }
    }

    pub(crate) fn call(&mut self, cpu: &Cpu<'_>) -> trn_kernels::Result<()> {
        let (Shape { n, k }, top_k) = (self.cold.weights.shape, self.top_k);
        let (stack, ids) = &self.routes[self.next % self.routes.len()];
        self.next += 1;
        let (w, (options, ws)) = (&self.cold.stacks[*stack], (MatmulOptions::default(), &mut self.workspace));
        let (tokens, slots) = (self.tokens, self.tokens * top_k);
        match (&self.x, &mut self.y) {
            (Values::Bf16(x), Values::Bf16(y)) => {
                let (x, y) = (MatRef::new(x, tokens, k)?, MatMut::new(y, slots, n)?);
                cpu.gather_matmul(x, RowSource::Token, w, ids, top_k, y, &options, ws)
            }
            (Values::F32(x), Values::F32(y)) => {
                let (x, y) = (MatRef::new(x, tokens, k)?, MatMut::new(y, slots, n)?);
                cpu.gather_matmul(x, RowSource::Token, w, ids, top_k, y, &options, ws)
            }
            _ => Ok(()), // x and y are of one type
        }
    }

    /// Bytes of weights that a call reads: each expert that its first route names, once.
    pub(crate) fn bytes(&self) -> usize {
        let named: HashSet<u32> = self.routes.iter().take(1).flat_map(|(_, ids)| ids.iter().copied()).collect();
        named.len() * self.cold.weights.bytes()
    }

    pub(crate) fn flops(&self) -> f64 {
        let Shape { n, k } = self.cold.weights.shape;
        2.0 * (self.tokens * self.top_k) as f64 * n as f64 * k as f64
    }

    /// Whether the last call was right: the first token's first slot and the last token's last one.
    pub(crate) fn check(&self) -> Result<(), String> {
        check(&self.cold.weights, &self.x, &self.y, (0, 0))?;
        check(&self.cold.weights, &self.x, &self.y, (self.tokens - 1, self.tokens * self.top_k - 1))
    }
}
