//! Metadata values.
#![forbid(unsafe_code)]

use super::cursor::Cursor;
use crate::error::Result;

/// How deep arrays may lie in arrays. Writers use one level.
const MAX_DEPTH: usize = 4;

/// Type of a metadata value, with GGUF's own code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(missing_docs)] // the names are the types
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    fn read(cursor: &mut Cursor<'_>) -> Result<Self> {
        let code = cursor.u32("a value type")?;
        match Self::ALL.get(code as usize) {
            Some(known) => Ok(*known),
            None => cursor.problem(format!("has a value of unknown type {code}")),
        }
    }

    /// Bytes of a value, if all values have the same and any bytes are a value.
    fn fixed_size(self) -> Option<u64> {
        match self {
            ValueType::U8 | ValueType::I8 => Some(1),
            ValueType::U16 | ValueType::I16 => Some(2),
            ValueType::U32 | ValueType::I32 | ValueType::F32 => Some(4),
            ValueType::U64 | ValueType::I64 | ValueType::F64 => Some(8),
            ValueType::Bool | ValueType::String | ValueType::Array => None,
        }
    }
}

/// A metadata value, borrowed from the file.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs)] // the names are the types
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    /// Bytes that should be UTF-8; tokens of a vocabulary sometimes are not.
    String(&'a [u8]),
    Array(Array<'a>),
}

impl<'a> Value<'a> {
    /// An integer of any width that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(x) => Some(x.into()),
            Value::U16(x) => Some(x.into()),
            Value::U32(x) => Some(x.into()),
            Value::U64(x) => Some(x),
            Value::I8(x) => x.try_into().ok(),
            Value::I16(x) => x.try_into().ok(),
            Value::I32(x) => x.try_into().ok(),
            Value::I64(x) => x.try_into().ok(),
            _ => None,
        }
    }

    /// A float of either width.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(x) => Some(x.into()),
            Value::F64(x) => Some(x),
            _ => None,
        }
    }

    /// A string that is UTF-8.
    pub fn as_str(&self) -> Option<&'a str> {
        match *self {
            Value::String(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// Reads a type word and its value.
    pub(super) fn read_typed(cursor: &mut Cursor<'a>) -> Result<Self> {
        let value_type = ValueType::read(cursor)?;
        Self::read(cursor, value_type, 0)
    }

    fn read(cursor: &mut Cursor<'a>, value_type: ValueType, depth: usize) -> Result<Self> {
        Ok(match value_type {
            ValueType::U8 => Value::U8(u8::from_le_bytes(cursor.array("a value")?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(cursor.array("a value")?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(cursor.array("a value")?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(cursor.array("a value")?)),
            ValueType::U32 => Value::U32(u32::from_le_bytes(cursor.array("a value")?)),
            ValueType::I32 => Value::I32(i32::from_le_bytes(cursor.array("a value")?)),
            ValueType::U64 => Value::U64(u64::from_le_bytes(cursor.array("a value")?)),
            ValueType::I64 => Value::I64(i64::from_le_bytes(cursor.array("a value")?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(cursor.array("a value")?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(cursor.array("a value")?)),
            ValueType::Bool => match cursor.array("a value")? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return cursor.problem(format!("has a bool of {other}, needed 0 or 1")),
            },
            ValueType::String => Value::String(cursor.string("a string")?),
            ValueType::Array => Value::Array(Array::read(cursor, depth + 1)?),
        })
    }
}

/// An array of values of one type: read on demand, so that a vocabulary of strings costs nothing to open.
#[derive(Clone, Copy, PartialEq)]
pub struct Array<'a> {
    element: ValueType,
    len: usize,
    bytes: &'a [u8],
    depth: usize,
}

impl<'a> Array<'a> {
    /// Reads type and length and passes over the elements, each of which is checked.
    fn read(cursor: &mut Cursor<'a>, depth: usize) -> Result<Self> {
        if depth > MAX_DEPTH {
            return cursor.problem(format!("has arrays in arrays deeper than {MAX_DEPTH}"));
        }
        let element = ValueType::read(cursor)?;
        let count = cursor.u64("an array's length")?;
        let mut walk = cursor.fork();
        let start = cursor.position();
        match element.fixed_size() {
            Some(size) => match count.checked_mul(size) {
                Some(bytes) => walk.take(bytes, "an array").map(|_| ())?,
                None => return cursor.problem(format!("has an array of {count} elements, which overflows")),
            },
            // Every element takes at least a byte, so the file's end bounds this loop.
            None => {
                for _ in 0..count {
                    Value::read(&mut walk, element, depth)?;
                }
            }
        }
        let bytes = cursor.take((walk.position() - start) as u64, "an array")?;
        // Fits: each element was found in the file.
        Ok(Array { element, len: count as usize, bytes, depth })
    }

    /// Type of the elements.
    pub fn element_type(&self) -> ValueType {
        self.element
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements in order.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let (element, depth) = (self.element, self.depth);
        let mut cursor = Cursor::new("array", self.bytes);
        // Checked when the file was opened, so none is an error.
        (0..self.len).map_while(move |_| Value::read(&mut cursor, element, depth).ok())
    }
}

impl std::fmt::Debug for Array<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{:?}; {}]", self.element, self.len)
    }
}
