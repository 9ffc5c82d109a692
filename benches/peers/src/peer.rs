//! What is called in turn: our kernels and theirs, each on weights that rotate over copies larger than the caches.

use crate::case::{Acts, Dense, Shape, Values, copies};
use crate::sample::timed;
use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use rayon::ThreadPool;
use trn_kernels::Cpu;

/// One contestant.
pub(crate) trait Peer {
    fn name(&self) -> String;
    /// Bytes of weights that a call reads.
    fn bytes(&self) -> usize;
    /// Calls it once: seconds taken.
    fn call(&mut self) -> Result<f64, String>;
    /// The first row of the last result; `None` if its operands are not ours.
    fn first_row(&self) -> Option<Result<Vec<f32>, String>>;
}

/// Our matmul.
pub(crate) struct Ours<'a> {
    pub(crate) name: String,
    pub(crate) pool: &'a ThreadPool,
    pub(crate) cpu: Cpu<'a>,
    pub(crate) dense: Dense<'a>,
    pub(crate) n: usize,
}

impl Peer for Ours<'_> {
    fn name(&self) -> String {
        format!("trn-kernels {}", self.name)
    }

    fn bytes(&self) -> usize {
        self.dense.bytes()
    }

    fn call(&mut self) -> Result<f64, String> {
        // From a thread of the pool, as a runtime calls. candle is faster from one that is in no pool.
        self.pool.install(|| timed(|| self.dense.call(&self.cpu)))
    }

    fn first_row(&self) -> Option<Result<Vec<f32>, String>> {
        Some(Ok(match &self.dense.y {
            Values::Bf16(y) => y[..self.n].iter().map(|v| v.to_f32()).collect(),
            Values::F32(y) => y[..self.n].to_vec(),
        }))
    }
}

/// The operands that all contestants of a comparison share, in f32.
pub(crate) struct Operands {
    pub(crate) shape: Shape,
    pub(crate) m: usize,
    /// `[m, k]`: values of bf16.
    pub(crate) x: Vec<f32>,
    /// `[n, k]`: the quantized weights' values.
    pub(crate) w: Vec<f32>,
}

impl Operands {
    fn x_tensor(&self) -> candle_core::Result<Tensor> {
        Tensor::from_slice(&self.x, (self.m, self.shape.k), &Device::Cpu)
    }

    fn w_tensor(&self) -> candle_core::Result<Tensor> {
        Tensor::from_slice(&self.w, (self.shape.n, self.shape.k), &Device::Cpu)
    }

    /// The first row of the product in f64.
    pub(crate) fn first_row(&self) -> Vec<f64> {
        let k = self.shape.k;
        let dot = |w: &[f32]| self.x[..k].iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
        self.w.chunks_exact(k).map(dot).collect()
    }
}

/// The result of a candle matmul: first row, as f32.
fn row_of(y: Option<&Tensor>) -> Result<Vec<f32>, String> {
    let y = y.ok_or("not called yet")?;
    y.get(0).and_then(|row| row.to_dtype(DType::F32)).and_then(|row| row.to_vec1()).map_err(|e| e.to_string())
}

/// candle's GGML-quantized matmul. The weights are quantized once more, from our values: the speed does not depend on them.
pub(crate) struct CandleQuantized {
    dtype: GgmlDType,
    bytes: usize,
    weights: Vec<QMatMul>,
    next: usize,
    x: Tensor,
    y: Option<Tensor>,
}

impl CandleQuantized {
    pub(crate) fn new(dtype: GgmlDType, on: &Operands, cold: usize) -> Result<Self, String> {
        let bytes = on.w.len() / dtype.block_size() * dtype.type_size();
        let make = || {
            let w = on.w_tensor()?;
            let copy = |_| QMatMul::from_qtensor(QTensor::quantize(&w, dtype)?);
            let weights = (0..copies(bytes, cold)).map(copy).collect::<candle_core::Result<_>>()?;
            candle_core::Result::Ok(CandleQuantized { dtype, bytes, weights, next: 0, x: on.x_tensor()?, y: None })
        };
        make().map_err(|e| e.to_string())
    }
}

impl Peer for CandleQuantized {
    fn name(&self) -> String {
        format!("candle {:?}", self.dtype)
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn call(&mut self) -> Result<f64, String> {
        let w = &self.weights[self.next % self.weights.len()];
        self.next += 1;
        timed(|| w.forward(&self.x).map(|y| self.y = Some(y)))
    }

    fn first_row(&self) -> Option<Result<Vec<f32>, String>> {
        Some(row_of(self.y.as_ref()))
    }
}

/// candle's bf16 matmul.
pub(crate) struct CandleBf16 {
    bytes: usize,
    weights: Vec<Tensor>,
    next: usize,
    x: Tensor,
    y: Option<Tensor>,
}

impl CandleBf16 {
    pub(crate) fn new(on: &Operands, cold: usize) -> Result<Self, String> {
        let bytes = 2 * on.w.len();
        let make = || {
            let w = on.w_tensor()?.to_dtype(DType::BF16)?;
            let weights = (0..copies(bytes, cold)).map(|_| w.copy()?.t()).collect::<candle_core::Result<_>>()?;
            let x = on.x_tensor()?.to_dtype(DType::BF16)?;
            candle_core::Result::Ok(CandleBf16 { bytes, weights, next: 0, x, y: None })
        };
        make().map_err(|e| e.to_string())
    }
}

impl Peer for CandleBf16 {
    fn name(&self) -> String {
        "candle bf16".into()
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn call(&mut self) -> Result<f64, String> {
        let w = &self.weights[self.next % self.weights.len()];
        self.next += 1;
        timed(|| self.x.matmul(w).map(|y| self.y = Some(y)))
    }

    fn first_row(&self) -> Option<Result<Vec<f32>, String>> {
        Some(row_of(self.y.as_ref()))
    }
}

/// The `gemm` crate in f32 on dequantized weights.
pub(crate) struct GemmF32<'a> {
    pool: &'a ThreadPool,
    on: &'a Operands,
    weights: Vec<Vec<f32>>,
    next: usize,
    y: Vec<f32>,
}

impl<'a> GemmF32<'a> {
    pub(crate) fn new(pool: &'a ThreadPool, on: &'a Operands, cold: usize) -> Self {
        let weights = vec![on.w.clone(); copies(size_of_val(&on.w[..]), cold)];
        GemmF32 { pool, on, weights, next: 0, y: vec![0.0; on.m * on.shape.n] }
    }
}

impl Peer for GemmF32<'_> {
    fn name(&self) -> String {
        "gemm f32, dequantized".into()
    }

    fn bytes(&self) -> usize {
        size_of_val(&self.on.w[..])
    }

    fn call(&mut self) -> Result<f64, String> {
        let (Shape { n, k }, m, x) = (self.on.shape, self.on.m, &self.on.x[..]);
        let w = &self.weights[self.next % self.weights.len()][..];
        self.next += 1;
        let (y, threads) = (&mut self.y[..], self.pool.current_num_threads());
        assert!(x.len() == m * k && w.len() == n * k && y.len() == m * n);
        let call = || {
            // SAFETY: x is [m, k] and y [m, n] row-major, w is [n, k] row-major and read as its transpose [k, n]: by the lengths just
            // checked every element of the three lies in its slice, and y is borrowed mutably.
            unsafe {
                gemm::gemm(
                    m,
                    n,
                    k,
                    y.as_mut_ptr(),
                    1,
                    n as isize,
                    false,
                    x.as_ptr(),
                    1,
                    k as isize,
                    w.as_ptr(),
                    k as isize,
                    1,
                    0.0,
                    1.0,
                    false,
                    false,
                    false,
                    gemm::Parallelism::Rayon(threads),
                );
            }
        };
        timed(|| {
            self.pool.install(call);
            Ok::<(), String>(())
        })
    }

    fn first_row(&self) -> Option<Result<Vec<f32>, String>> {
        Some(Ok(self.y[..self.on.shape.n].to_vec()))
    }
}

/// bf16 activations as all contestants get them.
pub(crate) fn activations(m: usize, k: usize) -> Vec<f32> {
    match Values::new(Acts::Bf16, m * k, Some(1)) {
        Values::Bf16(x) => x.iter().map(|v| v.to_f32()).collect(),
        Values::F32(x) => x,
    }
}
