//! `matmul_mx` and `matmul_fp8` with weights that stay on the device.
#![forbid(unsafe_code)]

use super::bytes;
use super::device::DeviceKernels;
use super::family::Family;
use crate::cpu::Parallelism;
use crate::error::{Error, Result, extent, length};
use crate::num::{BridgeReport, Fp8};
use crate::quant::{QuantizedMatrix, Scheme};
use crate::trainium::Target;
use crate::trainium::layout::{MxElement, MxLayout, RowElement, RowsLayout};
use crate::view::MatRef;
use half::bf16;
use std::sync::Arc;

/// `y = x w^T + bias` with MXFP4 or MXFP8 weights and bf16 activations, through `kernels/matmul_mx.py`.
#[derive(Debug)]
pub struct MatmulMxKernel {
    family: Family,
    n: usize,
    k: usize,
    output_bytes: usize,
}

/// The NKI name of a packed element, as the kernels' parameters spell it.
pub(super) fn element_name(element: MxElement) -> &'static str {
    match element {
        MxElement::E4M3Fn => "e4m3fn",
        MxElement::E5M2 => "e5m2",
        MxElement::E2M1 => "e2m1",
    }
}

impl MatmulMxKernel {
    /// Asks whether weights of this scheme and shape are compiled; `terms` as in [`MatmulMxKernel::new`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what is compiled.
    pub fn served(device: &DeviceKernels, scheme: Scheme, n: usize, k: usize, bias: bool, terms: usize) -> Result<()> {
        let layout = MxLayout::new(scheme, n, k, Default::default(), Default::default())?;
        Self::compiled(device, &layout, bias, terms).map(|_| ())
    }

    fn compiled<'d>(
        device: &'d DeviceKernels,
        layout: &MxLayout,
        bias: bool,
        terms: usize,
    ) -> Result<Vec<&'d super::CompiledKernel>> {
        let element = element_name(layout.element());
        let (n, k) = (layout.n(), layout.k());
        let with = if bias { "bias" } else { "no bias" };
        let wanted = format!("N {n}, K {k}, w_element {element}, x_terms {terms} and {with}");
        device.set().family("matmul_mx", "M", &wanted, |kernel| {
            let shape = kernel.input("w").map(|w| w.shape.as_slice());
            kernel.dim("N") == n
                && kernel.dim("K") == k
                && shape == Some(&layout.data_shape())
                && kernel.text("w_element").unwrap_or("e2m1") == element
                && kernel.int("x_terms").unwrap_or(1) == terms as i64
                && kernel.has("bias") == bias
                && !kernel.has("x_scale")
        })
    }

    /// Packs `weight` (`[n, k]`) and its `bias` (`[n]`, or empty for none) and writes them to the device.
    ///
    /// `terms`: 2 keeps bf16 activations exact (but for elements below 2^-13 of the largest in their 32), 1 rounds them to MXFP8 on
    /// the device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if no such kernel is compiled, or for another scheme; [`Error::Length`] for the bias;
    /// [`Error::Device`].
    pub fn new(
        device: &Arc<DeviceKernels>,
        weight: &QuantizedMatrix<'_>,
        bias: &[f32],
        terms: usize,
        parallelism: Parallelism<'_>,
    ) -> Result<Self> {
        if !bias.is_empty() {
            length("bias", bias.len(), weight.n())?;
        }
        let layout = MxLayout::of(weight)?;
        let kernels = Self::compiled(device, &layout, !bias.is_empty(), terms)?;
        let packed = layout.pack(weight, parallelism)?;
        if !packed.outer_scales().is_empty() {
            return Err(Error::Unsupported {
                what: format!("{:?} through matmul_mx", weight.scheme()),
                because: "it has no place for an f32 scale; matmul_fp8 has".into(),
            });
        }
        let mut resident = vec![
            ("w", device.resident(packed.data(), "w")?),
            ("w_scale", device.resident(packed.scales(), "w_scale")?),
        ];
        if !bias.is_empty() {
            let columns = layout.columns().pack(bias, 0.0)?;
            resident.push(("bias", device.resident(&bias_bytes(&kernels, &columns)?, "bias")?));
        }
        let output_bytes = output_bytes(&kernels)?;
        Ok(MatmulMxKernel {
            family: Family::new(device, &kernels, "M", &resident)?,
            n: weight.n(),
            k: weight.k(),
            output_bytes,
        })
    }

    /// `x` is `[m, k]`; `store` gets each row of y `[n]`.
    ///
    /// # Errors
    /// [`Error::Extent`]; [`Error::Value`] for an activation that is no finite number, since what `quantize_mx` makes of one is
    /// not documented; [`Error::Device`].
    pub fn run(&self, x: MatRef<'_, bf16>, mut store: impl FnMut(usize, &mut dyn Iterator<Item = f32>)) -> Result<()> {
        extent("activations", "k", x.cols(), self.k)?;
        bytes::check_finite("activations", x)?;
        let pieces = self.family.pieces(x.rows());
        let (mut sent, mut got) = (Vec::new(), Vec::new());
        let (family, row) = (&self.family, self.n * self.output_bytes);
        family.run(
            &pieces,
            |piece| {
                sent.clear();
                for i in piece.start..piece.start + piece.len {
                    bytes::put_bf16(&mut sent, x.row(i).unwrap_or_default());
                }
                // Rows of padding: any numbers do, zeros never surprise.
                sent.resize(piece.size * self.k * size_of::<bf16>(), 0);
                Ok(family.tensor(piece, "x")?.write(0, &sent)?)
            },
            |piece| {
                got.resize(piece.len * row, 0);
                family.tensor(piece, "output_0")?.read(0, &mut got)?;
                for (i, row) in got.chunks_exact(row.max(1)).enumerate() {
                    store(piece.start + i, &mut bytes::to_f32(row, self.output_bytes));
                }
                Ok(())
            },
        )
    }
}

/// The bias in the type that the kernels take.
fn bias_bytes(kernels: &[&super::CompiledKernel], bias: &[f32]) -> Result<Vec<u8>> {
    let sizes = kernels.iter().filter_map(|k| k.input("bias")).map(|t| t.dtype.size());
    match same(sizes, "bias")? {
        4 => Ok(bytes::of_f32(bias)),
        _ => {
            let mut out = Vec::new();
            bytes::put_bf16(&mut out, &bias.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>());
            if bytes::to_f32(&out, 2).zip(bias).any(|(a, b)| a.to_bits() != b.to_bits()) {
                return Err(Error::Unsupported {
                    what: "a bias that is not exact in bf16".into(),
                    because: "the kernel was compiled for a bf16 bias".into(),
                });
            }
            Ok(out)
        }
    }
}

/// Bytes of an element of the result.
pub(super) fn output_bytes(kernels: &[&super::CompiledKernel]) -> Result<usize> {
    same(kernels.iter().filter_map(|k| k.bound.outputs().first()).map(|t| t.dtype.size()), "output")
}

/// The one value that all compiled shapes share.
fn same(mut values: impl Iterator<Item = usize>, what: &'static str) -> Result<usize> {
    let first = values.next().unwrap_or(0);
    if values.all(|v| v == first) {
        return Ok(first);
    }
    Err(Error::Unsupported {
        what: format!("shapes compiled for different types of {what}"),
        because: "a problem has one type, whatever its size".into(),
    })
}

/// `y = (x w^T) scales + bias` with FP8 weights and FP8 activations, through `kernels/matmul_fp8.py`.
#[derive(Debug)]
pub struct MatmulFp8Kernel {
    family: Family,
    n: usize,
    k: usize,
    output_bytes: usize,
    /// Of the activations.
    scheme: Scheme,
}

/// What the device reads for an FP8 weight: Trainium2 has no E4M3FN.
fn row_element(target: Target, e: Fp8) -> RowElement {
    RowElement::Fp8(if e == Fp8::E4M3Fn && target != Target::Trn3 { Fp8::E4M3Ieee } else { e })
}

fn fp8_name(e: Fp8) -> Option<&'static str> {
    match e {
        Fp8::E4M3Ieee => Some("e4m3"),
        Fp8::E4M3Fn => Some("e4m3fn"),
        Fp8::E5M2 => Some("e5m2"),
        Fp8::E3M4 => None,
    }
}

/// Refuses weights that Trainium2's E4M3 cannot hold exactly.
fn check_bridge(report: &BridgeReport) -> Result<()> {
    if report.rounded == 0 && report.overflowed == 0 {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("E4M3FN weights of which {} change their value as E4M3 IEEE", report.rounded + report.overflowed),
        because: "Trainium2 reads no E4M3FN; half of an odd subnormal is not one of its codes".into(),
    })
}

/// f32 scales of a call's activations: rows x columns.
fn scale_shape(scheme: Scheme, m: usize, k: usize) -> Option<[usize; 2]> {
    match scheme {
        Scheme::Fp8PerTensor(_) => Some([1, 1]),
        Scheme::Fp8PerChannel(_) => Some([m, 1]),
        Scheme::Fp8Blockwise { n: 1, k: 128, .. } => Some([m, k.div_ceil(128)]),
        _ => None,
    }
}

impl MatmulFp8Kernel {
    /// Asks whether weights of this scheme and shape are compiled for activations of `x_scheme`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what is compiled.
    pub fn served(
        device: &DeviceKernels,
        scheme: Scheme,
        n: usize,
        k: usize,
        bias: bool,
        x_scheme: Scheme,
    ) -> Result<()> {
        Self::compiled(device, scheme, (n, k), bias, x_scheme).map(|_| ())
    }

    fn compiled(
        device: &DeviceKernels,
        scheme: Scheme,
        (n, k): (usize, usize),
        bias: bool,
        x_scheme: Scheme,
    ) -> Result<Vec<&super::CompiledKernel>> {
        let refused = |because: &str| Error::Unsupported {
            what: format!("{scheme:?} weights with {x_scheme:?} activations through matmul_fp8"),
            because: because.into(),
        };
        let (Some(w_element), Some(x_element)) = (scheme.fp8(), x_scheme.fp8()) else {
            return Err(refused("it takes FP8 with f32 scales on both sides"));
        };
        if matches!(scheme, Scheme::Mxfp8(_)) || scale_shape(x_scheme, 1, k).is_none() {
            return Err(refused("it takes f32 scales: per tensor, per row, or 1 x 128 activations"));
        }
        let blocks = matches!(scheme, Scheme::Fp8Blockwise { .. });
        if blocks != matches!(x_scheme, Scheme::Fp8Blockwise { .. })
            || matches!(scheme, Scheme::Fp8Blockwise { n, k, .. } if (n, k) != (128, 128))
        {
            return Err(refused("128 x 128 weight scales go with 1 x 128 activation scales"));
        }
        let wanted = format!("N {n}, K {k}, {scheme:?} weights, {x_scheme:?} activations, bias {bias}");
        device.set().family("matmul_fp8", "M", &wanted, |kernel| {
            let m = kernel.dim("M");
            let RowElement::Fp8(read) = row_element(kernel.target, w_element) else { return false };
            let Ok(layout) =
                RowsLayout::new(scheme, RowElement::Fp8(read), n, k, Default::default(), Default::default())
            else {
                return false;
            };
            let shape = |name: &str| kernel.input(name).map(|t| t.shape.as_slice());
            let w_scale: &[usize] = match scheme {
                Scheme::Fp8PerTensor(_) => &[1, 1],
                Scheme::Fp8PerChannel(_) => &[1, layout.columns().count()],
                _ => &[n.div_ceil(128), k.div_ceil(128)],
            };
            kernel.dim("N") == n
                && kernel.dim("K") == k
                && shape("w") == Some(&layout.data_shape())
                && shape("w_scale") == Some(w_scale)
                && shape("x_scale") == scale_shape(x_scheme, m, k).as_ref().map(|s| &s[..])
                && kernel.text("w_element").unwrap_or("e4m3") == fp8_name(read).unwrap_or_default()
                && kernel.text("x_element").unwrap_or("e4m3") == fp8_name(x_element).unwrap_or_default()
                && kernel.truth("blocks") == blocks
                && kernel.text("activation").unwrap_or("none") == "none"
                && kernel.has("bias") == bias
        })
    }

    /// Packs `weight` (`[n, k]`, FP8 with f32 scales) and its `bias` (`[n]`, or empty) and writes them to the device. Calls bring
    /// activations of `x_scheme`: per tensor, per row, or 1 x 128 blocks with 128 x 128 weights.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if no such kernel is compiled; [`Error::Length`] for the bias; [`Error::Device`].
    pub fn new(
        device: &Arc<DeviceKernels>,
        weight: &QuantizedMatrix<'_>,
        bias: &[f32],
        x_scheme: Scheme,
        parallelism: Parallelism<'_>,
    ) -> Result<Self> {
        if !bias.is_empty() {
            length("bias", bias.len(), weight.n())?;
        }
        let (scheme, n, k) = (weight.scheme(), weight.n(), weight.k());
        let kernels = Self::compiled(device, scheme, (n, k), !bias.is_empty(), x_scheme)?;
        let (Some(first), Some(e)) = (kernels.first(), scheme.fp8()) else {
            return Err(Error::Missing { operand: "a compiled kernel".into(), needed_by: "matmul_fp8".into() });
        };
        let layout = RowsLayout::of(weight, row_element(first.target, e))?;
        let (packed, report) = layout.pack(weight, parallelism)?;
        check_bridge(&report)?;
        let scales = bytes::of_f32(packed.scales());
        let mut resident =
            vec![("w", device.resident(packed.data(), "w")?), ("w_scale", device.resident(&scales, "w_scale")?)];
        if !bias.is_empty() {
            let columns = layout.columns().pack(bias, 0.0)?;
            resident.push(("bias", device.resident(&bias_bytes(&kernels, &columns)?, "bias")?));
        }
        let output_bytes = output_bytes(&kernels)?;
        let family = Family::new(device, &kernels, "M", &resident)?;
        Ok(MatmulFp8Kernel { family, n, k, output_bytes, scheme: x_scheme })
    }

    /// The scheme of the activations that calls bring.
    pub fn activations(&self) -> Scheme {
        self.scheme
    }

    /// `x` is `[m, k]` of the scheme that this was made for; `store` gets each row of y `[n]`.
    ///
    /// # Errors
    /// [`Error::Extent`]; [`Error::Unsupported`] for another scheme; [`Error::Device`].
    pub fn run(
        &self,
        x: &QuantizedMatrix<'_>,
        mut store: impl FnMut(usize, &mut dyn Iterator<Item = f32>),
    ) -> Result<()> {
        extent("activations", "k", x.k(), self.k)?;
        if x.scheme() != self.scheme {
            return Err(Error::Unsupported {
                what: format!("activations of {:?}", x.scheme()),
                because: format!("the kernel was made for {:?}", self.scheme),
            });
        }
        let pieces = self.family.pieces(x.n());
        let (mut codes, mut scales, mut got) = (Vec::new(), Vec::new(), Vec::new());
        let (family, row) = (&self.family, self.n * self.output_bytes);
        family.run(
            &pieces,
            |piece| {
                codes.clear();
                scales.clear();
                let [rows, columns] = scale_shape(self.scheme, piece.size, self.k).unwrap_or_default();
                for i in piece.start..piece.start + piece.len {
                    codes.extend((0..self.k).map(|c| x.code(i, c).unwrap_or_default() as u8));
                }
                codes.resize(piece.size * self.k, 0);
                for i in 0..rows {
                    let i = (piece.start + i).min(x.n().saturating_sub(1));
                    scales.extend((0..columns).map(|c| x.outer_scale(i, c * 128).unwrap_or(1.0)));
                }
                family.tensor(piece, "x")?.write(0, &codes)?;
                Ok(family.tensor(piece, "x_scale")?.write(0, &bytes::of_f32(&scales))?)
            },
            |piece| {
                got.resize(piece.len * row, 0);
                family.tensor(piece, "output_0")?.read(0, &mut got)?;
                for (i, row) in got.chunks_exact(row.max(1)).enumerate() {
                    store(piece.start + i, &mut bytes::to_f32(row, self.output_bytes));
                }
                Ok(())
            },
        )
    }
}
