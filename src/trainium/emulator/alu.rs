//! Operators of the vector ALU and functions of ScalarE, on f32 values.
#![forbid(unsafe_code)]

use super::fault::{Result, Rule, fault};

/// An operator token of `nki.language`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Alu {
    Add,
    Subtract,
    Multiply,
    Maximum,
    Minimum,
    AbsMax,
    AbsMin,
    Power,
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    LogicalAnd,
    LogicalOr,
    LogicalXor,
    BitwiseAnd,
    BitwiseOr,
    BitwiseXor,
    Invert,
    LeftShift,
    RightShift,
    Abs,
    Square,
    Relu,
    Rsqrt,
    Reciprocal,
}

use Alu::*;

impl Alu {
    /// The operator called `name`.
    pub(super) fn by_name(name: &str) -> Option<Alu> {
        Some(match name {
            "add" => Add,
            "subtract" => Subtract,
            "multiply" => Multiply,
            "maximum" | "max" => Maximum,
            "minimum" | "min" => Minimum,
            "abs_max" => AbsMax,
            "abs_min" => AbsMin,
            "power" => Power,
            "equal" => Equal,
            "not_equal" => NotEqual,
            "less" => Less,
            "less_equal" => LessEqual,
            "greater" => Greater,
            "greater_equal" => GreaterEqual,
            "logical_and" => LogicalAnd,
            "logical_or" => LogicalOr,
            "logical_xor" => LogicalXor,
            "bitwise_and" => BitwiseAnd,
            "bitwise_or" => BitwiseOr,
            "bitwise_xor" => BitwiseXor,
            "invert" => Invert,
            "left_shift" => LeftShift,
            "right_shift" => RightShift,
            "abs" => Abs,
            "square" => Square,
            "relu" => Relu,
            "rsqrt" => Rsqrt,
            "reciprocal" => Reciprocal,
            _ => return None,
        })
    }

    /// Whether it takes one input.
    pub(super) fn is_unary(self) -> bool {
        matches!(self, Invert | Abs | Square | Relu | Rsqrt | Reciprocal)
    }

    /// Whether it works on bits and needs integers.
    pub(super) fn is_bitwise(self) -> bool {
        matches!(self, BitwiseAnd | BitwiseOr | BitwiseXor | Invert | LeftShift | RightShift)
    }

    /// Whether it is one of the six comparisons.
    pub(super) fn is_comparison(self) -> bool {
        matches!(self, Equal | NotEqual | Less | LessEqual | Greater | GreaterEqual)
    }

    /// `x op y` in f32; a unary operator ignores `y`. A bitwise operator has no f32 value and gives NaN: the loader keeps
    /// the two kinds apart.
    pub(super) fn apply(self, x: f32, y: f32) -> f32 {
        let truth = |t: bool| f32::from(u8::from(t));
        match self {
            Add => x + y,
            Subtract => x - y,
            Multiply => x * y,
            Maximum => maximum(x, y),
            Minimum => -maximum(-x, -y),
            // The operand itself, with its sign; y on ties.
            AbsMax => {
                if x.abs() > y.abs() {
                    x
                } else {
                    y
                }
            }
            AbsMin => {
                if x.abs() < y.abs() {
                    x
                } else {
                    y
                }
            }
            Power => libm::pow(x.into(), y.into()) as f32,
            Equal => truth(x == y),
            NotEqual => truth(x != y),
            Less => truth(x < y),
            LessEqual => truth(x <= y),
            Greater => truth(x > y),
            GreaterEqual => truth(x >= y),
            LogicalAnd => truth(x != 0.0 && y != 0.0),
            LogicalOr => truth(x != 0.0 || y != 0.0),
            LogicalXor => truth((x != 0.0) != (y != 0.0)),
            Abs => x.abs(),
            Square => x * x,
            Relu => maximum(x, 0.0),
            // f64 carries enough that the one rounding to f32 is the exact result's but for ties of the f64 itself.
            Rsqrt => (1.0 / f64::from(x).sqrt()) as f32,
            Reciprocal => 1.0 / x,
            BitwiseAnd | BitwiseOr | BitwiseXor | Invert | LeftShift | RightShift => f32::NAN,
        }
    }

    /// `x op y` on the low `width` bits; `signed` chooses the arithmetic right shift.
    ///
    /// # Errors
    /// [`Rule::Value`] for a shift by the width or more, [`Rule::Operand`] for an arithmetic operator.
    pub(super) fn apply_bits(self, x: u32, y: u32, width: u32, signed: bool) -> Result<u32> {
        let mask = u32::MAX >> (32 - width);
        if matches!(self, LeftShift | RightShift) && y >= width {
            return fault(Rule::Value, format!("a shift by {y} of {width} bits has no defined result"));
        }
        let out = match self {
            BitwiseAnd => x & y,
            BitwiseOr => x | y,
            BitwiseXor => x ^ y,
            Invert => !x,
            LeftShift => x << y,
            RightShift if signed => ((x << (32 - width)) as i32 >> (32 - width) >> y) as u32,
            RightShift => x >> y,
            _ => return fault(Rule::Operand, "an arithmetic operator on bits"),
        };
        Ok(out & mask)
    }

    /// `x op y` in exact integer arithmetic (32-bit `tensor_tensor` on GpSimdE).
    pub(super) fn apply_integer(self, x: i64, y: i64) -> Result<i64> {
        Ok(match self {
            Add => x + y,
            Subtract => x - y,
            // The largest of uint32 leaves i64 too; a bound of i64 is refused like any result beyond the type.
            Multiply => x.saturating_mul(y),
            Maximum => x.max(y),
            Minimum => x.min(y),
            AbsMax => {
                if x.abs() > y.abs() {
                    x
                } else {
                    y
                }
            }
            AbsMin => {
                if x.abs() < y.abs() {
                    x
                } else {
                    y
                }
            }
            _ if self.is_comparison() => compare_integers(self, x, y).into(),
            LogicalAnd => i64::from(x != 0 && y != 0),
            LogicalOr => i64::from(x != 0 || y != 0),
            LogicalXor => i64::from((x != 0) != (y != 0)),
            _ => return fault(Rule::Operand, "this operator has no documented result on 32-bit integers"),
        })
    }

    /// What a reduction by this operator starts from, if it has a defined order-free result.
    pub(super) fn identity(self) -> Option<f32> {
        match self {
            Add => Some(0.0),
            Multiply => Some(1.0),
            Maximum => Some(f32::NEG_INFINITY),
            Minimum => Some(f32::INFINITY),
            AbsMax => Some(0.0),
            AbsMin => Some(f32::INFINITY),
            _ => None,
        }
    }

    /// Whether every engine that reduces can reduce by it.
    pub(super) fn is_reduction(self) -> bool {
        matches!(self, Add | Multiply | Maximum | Minimum)
    }
}

/// Whether a comparison holds between integers; false for other operators.
pub(super) fn compare_integers(op: Alu, x: i64, y: i64) -> bool {
    match op {
        Equal => x == y,
        NotEqual => x != y,
        Less => x < y,
        LessEqual => x <= y,
        Greater => x > y,
        GreaterEqual => x >= y,
        _ => false,
    }
}

/// The larger; NaN if either is.
fn maximum(x: f32, y: f32) -> f32 {
    if x.is_nan() || x > y { x } else { y }
}

/// A function of ScalarE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Function {
    Copy,
    Exp,
    Log,
    Sqrt,
    Rsqrt,
    Reciprocal,
    Square,
    Abs,
    Sign,
    Relu,
    Sigmoid,
    Tanh,
    Silu,
    Gelu,
    GeluApprxTanh,
    GeluApprxSigmoid,
    Softplus,
    Erf,
    Sin,
}

impl Function {
    /// The function called `name`.
    pub(super) fn by_name(name: &str) -> Option<Function> {
        Some(match name {
            "copy" => Function::Copy,
            "exp" => Function::Exp,
            "log" => Function::Log,
            "sqrt" => Function::Sqrt,
            "rsqrt" => Function::Rsqrt,
            "reciprocal" => Function::Reciprocal,
            "square" => Function::Square,
            "abs" => Function::Abs,
            "sign" => Function::Sign,
            "relu" => Function::Relu,
            "sigmoid" => Function::Sigmoid,
            "tanh" => Function::Tanh,
            "silu" => Function::Silu,
            "gelu" => Function::Gelu,
            "gelu_apprx_tanh" => Function::GeluApprxTanh,
            "gelu_apprx_sigmoid" => Function::GeluApprxSigmoid,
            "softplus" => Function::Softplus,
            "erf" => Function::Erf,
            "sin" => Function::Sin,
            _ => return None,
        })
    }

    /// Smallest and largest input for which the device is documented, and whether they bound the magnitude
    /// (NKI API reference, valid ranges of activation functions).
    fn domain(self) -> Option<(f64, f64, bool)> {
        let power = |e: i32| 2f64.powi(e);
        match self {
            Function::Log => Some((power(-64), power(64), false)),
            Function::Sqrt => Some((power(-116), power(118), false)),
            Function::Rsqrt => Some((power(-87), power(97), false)),
            Function::Reciprocal => Some((power(-42), power(42), true)),
            // The bound is pi in f32, which lies above pi.
            Function::Sin => Some((0.0, std::f32::consts::PI.into(), true)),
            _ => None,
        }
    }

    /// The function in f64, rounded to f32 once: the device's own polynomials are not documented.
    ///
    /// # Errors
    /// [`Rule::Value`] outside the documented range, where the device returns garbage.
    pub(super) fn apply(self, x: f32) -> Result<f32> {
        let wide = f64::from(x);
        if let Some((low, high, magnitude)) = self.domain() {
            let measured = if magnitude { wide.abs() } else { wide };
            if !(low..=high).contains(&measured) {
                return fault(Rule::Value, format!("{self:?} of {x}: the device is defined from {low:e} to {high:e}"));
            }
        }
        let sigmoid = |x: f64| 1.0 / (1.0 + libm::exp(-x));
        let y = match self {
            Function::Copy => return Ok(x),
            Function::Exp => libm::exp(wide),
            Function::Log => libm::log(wide),
            Function::Sqrt => wide.sqrt(),
            Function::Rsqrt => 1.0 / wide.sqrt(),
            Function::Reciprocal => 1.0 / wide,
            Function::Square => wide * wide,
            Function::Abs => wide.abs(),
            Function::Sign => {
                if wide == 0.0 || wide.is_nan() {
                    wide
                } else {
                    wide.signum()
                }
            }
            Function::Relu => return Ok(maximum(x, 0.0)),
            Function::Sigmoid => sigmoid(wide),
            Function::Tanh => libm::tanh(wide),
            // The limit, where the product would be infinity times zero.
            Function::Silu | Function::GeluApprxSigmoid if wide == f64::NEG_INFINITY => 0.0,
            Function::Silu => wide * sigmoid(wide),
            Function::Gelu => 0.5 * wide * (1.0 + libm::erf(wide / std::f64::consts::SQRT_2)),
            Function::GeluApprxTanh => {
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide * wide * wide);
                0.5 * wide * (1.0 + libm::tanh(inner))
            }
            Function::GeluApprxSigmoid => wide * sigmoid(1.702 * wide),
            Function::Softplus => wide.max(0.0) + libm::log1p(libm::exp(-wide.abs())),
            Function::Erf => libm::erf(wide),
            Function::Sin => libm::sin(wide),
        };
        Ok(y as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn abs_max_returns_the_operand_with_its_sign_and_the_second_on_ties() {
        assert_eq!([AbsMax.apply(-5.0, 3.0), AbsMax.apply(1.0, -1.0)], [-5.0, -1.0]);
        assert_eq!([AbsMin.apply(5.0, -3.0), AbsMin.apply(1.0, -1.0)], [-3.0, -1.0]);
    }

    #[test]
    fn minimum_and_maximum_pass_nan_on() {
        for op in [Maximum, Minimum] {
            assert!(op.apply(f32::NAN, 1.0).is_nan() && op.apply(1.0, f32::NAN).is_nan());
        }
        assert_eq!([Maximum.apply(-1.0, 2.0), Minimum.apply(-1.0, 2.0)], [2.0, -1.0]);
    }

    #[test]
    fn shifts_know_width_and_sign() {
        assert_eq!(RightShift.apply_bits(0x80, 3, 8, true), Ok(0xF0));
        assert_eq!(RightShift.apply_bits(0x80, 3, 8, false), Ok(0x10));
        assert_eq!(LeftShift.apply_bits(0x81, 1, 8, false), Ok(0x02));
        assert_eq!(LeftShift.apply_bits(1, 8, 8, false).unwrap_err().rule, Rule::Value);
    }

    #[test]
    fn exact_limits_and_documented_ranges() {
        assert_eq!(Function::Exp.apply(f32::NEG_INFINITY), Ok(0.0));
        assert_eq!(Function::Exp.apply(0.0), Ok(1.0));
        assert_eq!(Function::Sin.apply(9.0).unwrap_err().rule, Rule::Value);
        assert_eq!(Function::Rsqrt.apply(0.0).unwrap_err().rule, Rule::Value);
        assert_eq!(Function::Reciprocal.apply(-4.0), Ok(-0.25));
    }
}
