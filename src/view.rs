//! Borrowed slices with extents and a row stride. Every bound is checked here, once, so that kernels can rely on it.
#![forbid(unsafe_code)]

use crate::error::{Error, Result, length, mul};

/// Elements that `rows` rows of `cols` elements, `stride` apart, span from first to last.
fn span(operand: &'static str, rows: usize, cols: usize, stride: usize) -> Result<usize> {
    if rows == 0 || cols == 0 {
        return Ok(0);
    }
    if rows > 1 && stride < cols {
        return Err(Error::Stride { operand: operand.into(), got: stride, needed: cols });
    }
    mul(operand, rows - 1, stride)?.checked_add(cols).ok_or(Error::Overflow { operand: operand.into() })
}

/// Asks for `len` to cover a strided span.
fn covers(operand: &'static str, len: usize, needed: usize) -> Result<()> {
    if len >= needed { Ok(()) } else { Err(Error::Length { operand: operand.into(), got: len, needed }) }
}

macro_rules! matrix {
    ($name:ident, $operand:literal, $slice:ty, $doc:literal) => {
        #[doc = $doc]
        ///
        /// Layout: element `(i, j)` is `data[i * row_stride + j]`; columns are contiguous.
        #[derive(Debug)]
        pub struct $name<'a, T> {
            data: $slice,
            rows: usize,
            cols: usize,
            row_stride: usize,
        }

        impl<'a, T> $name<'a, T> {
            /// `rows` x `cols` contiguous elements.
            ///
            /// # Errors
            /// [`Error::Length`] unless `data` holds exactly `rows * cols` elements; [`Error::Overflow`].
            pub fn new(data: $slice, rows: usize, cols: usize) -> Result<Self> {
                length($operand, data.len(), mul($operand, rows, cols)?)?;
                Ok(Self { data, rows, cols, row_stride: cols })
            }

            /// `rows` x `cols` elements, rows `row_stride` elements apart.
            ///
            /// # Errors
            /// [`Error::Stride`] if rows would overlap; [`Error::Length`] if `data` does not reach the last element;
            /// [`Error::Overflow`].
            pub fn with_stride(data: $slice, rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
                covers($operand, data.len(), span($operand, rows, cols, row_stride)?)?;
                Ok(Self { data, rows, cols, row_stride })
            }

            /// Number of rows.
            pub fn rows(&self) -> usize {
                self.rows
            }

            /// Number of columns.
            pub fn cols(&self) -> usize {
                self.cols
            }

            /// Elements from one row's start to the next row's.
            pub fn row_stride(&self) -> usize {
                self.row_stride
            }

            /// Row `i`, or `None` if `i >= rows`.
            pub fn row(&self, i: usize) -> Option<&[T]> {
                if i >= self.rows {
                    return None;
                }
                if self.cols == 0 {
                    return Some(&[]);
                }
                self.data.get(i * self.row_stride..i * self.row_stride + self.cols)
            }
        }
    };
}

matrix!(MatRef, "matrix", &'a [T], "A borrowed row-major matrix.");
matrix!(MatMut, "matrix", &'a mut [T], "A mutably borrowed row-major matrix.");

impl<T> Clone for MatRef<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for MatRef<'_, T> {}

impl<'a, T> MatRef<'a, T> {
    /// Row `i` with the lifetime of the data, or `None` if `i >= rows`.
    pub(crate) fn row_of(&self, i: usize) -> Option<&'a [T]> {
        if i >= self.rows {
            return None;
        }
        if self.cols == 0 {
            return Some(&[]);
        }
        self.data.get(i * self.row_stride..i * self.row_stride + self.cols)
    }

    /// The slice and its extents: `(data, rows, cols, row_stride)`.
    pub(crate) fn into_parts(self) -> (&'a [T], usize, usize, usize) {
        (self.data, self.rows, self.cols, self.row_stride)
    }

    /// A view that [`MatRef::into_parts`] took apart, over data of another type and the same length.
    pub(crate) fn from_parts((data, rows, cols, row_stride): (&'a [T], usize, usize, usize)) -> Self {
        MatRef { data, rows, cols, row_stride }
    }

    /// Rows `start..start + rows`.
    ///
    /// # Errors
    /// [`Error::Index`] if the range reaches past the last row.
    pub fn rows_at(&self, start: usize, rows: usize) -> Result<MatRef<'a, T>> {
        let limit = self.rows.saturating_add(1);
        if start > self.rows {
            return Err(Error::index("first row", 0, start, limit));
        }
        if rows > self.rows - start {
            return Err(Error::index("end of the rows", 0, start.saturating_add(rows), limit));
        }
        let data = if rows == 0 || self.cols == 0 { &[] } else { &self.data[start * self.row_stride..] };
        Ok(MatRef { data, rows, cols: self.cols, row_stride: self.row_stride })
    }
}

impl<'a, T> MatMut<'a, T> {
    /// The slice and its extents: `(data, rows, cols, row_stride)`.
    pub(crate) fn into_parts(self) -> (&'a mut [T], usize, usize, usize) {
        (self.data, self.rows, self.cols, self.row_stride)
    }

    /// A view that [`MatMut::into_parts`] took apart, over data of another type and the same length.
    pub(crate) fn from_parts((data, rows, cols, row_stride): (&'a mut [T], usize, usize, usize)) -> Self {
        MatMut { data, rows, cols, row_stride }
    }

    /// Row `i`, mutable, or `None` if `i >= rows`.
    pub fn row_mut(&mut self, i: usize) -> Option<&mut [T]> {
        if i >= self.rows {
            return None;
        }
        if self.cols == 0 {
            return Some(&mut []);
        }
        self.data.get_mut(i * self.row_stride..i * self.row_stride + self.cols)
    }

    /// The same matrix, borrowed for less long.
    pub fn reborrow(&mut self) -> MatMut<'_, T> {
        MatMut { data: self.data, rows: self.rows, cols: self.cols, row_stride: self.row_stride }
    }

    /// Read-only view.
    pub fn as_ref(&self) -> MatRef<'_, T> {
        MatRef { data: self.data, rows: self.rows, cols: self.cols, row_stride: self.row_stride }
    }

    /// The slice from the first element on; rows start `row_stride` apart.
    pub(crate) fn data_mut(&mut self) -> &mut [T] {
        self.data
    }
}

macro_rules! heads {
    ($name:ident, $operand:literal, $slice:ty, $doc:literal) => {
        #[doc = $doc]
        ///
        /// Layout: element `(t, h, d)` is `data[t * token_stride + h * head_dim + d]`: heads of one token are contiguous.
        #[derive(Debug)]
        pub struct $name<'a, T> {
            data: $slice,
            tokens: usize,
            heads: usize,
            head_dim: usize,
            token_stride: usize,
        }

        impl<'a, T> $name<'a, T> {
            /// `[tokens, heads, head_dim]`, contiguous.
            ///
            /// # Errors
            /// [`Error::Length`] unless `data` holds exactly the product of the extents; [`Error::Overflow`].
            pub fn new(data: $slice, tokens: usize, heads: usize, head_dim: usize) -> Result<Self> {
                let row = mul($operand, heads, head_dim)?;
                length($operand, data.len(), mul($operand, tokens, row)?)?;
                Ok(Self { data, tokens, heads, head_dim, token_stride: row })
            }

            /// `[tokens, heads, head_dim]`, tokens `token_stride` elements apart (a slice of a fused qkv row, say).
            ///
            /// # Errors
            /// [`Error::Stride`] if tokens would overlap; [`Error::Length`] if `data` does not reach the last element;
            /// [`Error::Overflow`].
            pub fn with_stride(
                data: $slice,
                tokens: usize,
                heads: usize,
                head_dim: usize,
                token_stride: usize,
            ) -> Result<Self> {
                let row = mul($operand, heads, head_dim)?;
                covers($operand, data.len(), span($operand, tokens, row, token_stride)?)?;
                Ok(Self { data, tokens, heads, head_dim, token_stride })
            }

            /// Number of tokens.
            pub fn tokens(&self) -> usize {
                self.tokens
            }

            /// Number of heads.
            pub fn heads(&self) -> usize {
                self.heads
            }

            /// Elements of one head.
            pub fn head_dim(&self) -> usize {
                self.head_dim
            }

            /// Elements from one token's start to the next token's.
            pub fn token_stride(&self) -> usize {
                self.token_stride
            }

            /// Data and extents: tokens, heads, head_dim, token_stride.
            pub(crate) fn into_parts(self) -> ($slice, [usize; 4]) {
                (self.data, [self.tokens, self.heads, self.head_dim, self.token_stride])
            }

            /// What [`into_parts`](Self::into_parts) gave, its elements perhaps under another name of their type.
            pub(crate) fn from_parts((data, [tokens, heads, head_dim, token_stride]): ($slice, [usize; 4])) -> Self {
                Self { data, tokens, heads, head_dim, token_stride }
            }

            /// The `head_dim` elements of token `t`, head `h`, or `None` outside the extents.
            pub fn head(&self, t: usize, h: usize) -> Option<&[T]> {
                if t >= self.tokens || h >= self.heads {
                    return None;
                }
                if self.head_dim == 0 {
                    return Some(&[]);
                }
                let at = t * self.token_stride + h * self.head_dim;
                self.data.get(at..at + self.head_dim)
            }
        }
    };
}

heads!(HeadsRef, "heads", &'a [T], "Borrowed per-head vectors: queries, keys or values of a batch of tokens.");
heads!(HeadsMut, "heads", &'a mut [T], "Mutably borrowed per-head vectors: attention outputs of a batch of tokens.");

impl<T> Clone for HeadsRef<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for HeadsRef<'_, T> {}

impl<T> HeadsMut<'_, T> {
    /// The `head_dim` elements of token `t`, head `h`, mutable, or `None` outside the extents.
    pub fn head_mut(&mut self, t: usize, h: usize) -> Option<&mut [T]> {
        if t >= self.tokens || h >= self.heads {
            return None;
        }
        if self.head_dim == 0 {
            return Some(&mut []);
        }
        let at = t * self.token_stride + h * self.head_dim;
        self.data.get_mut(at..at + self.head_dim)
    }

    /// The same heads, borrowed for less long.
    pub fn reborrow(&mut self) -> HeadsMut<'_, T> {
        HeadsMut {
            data: self.data,
            tokens: self.tokens,
            heads: self.heads,
            head_dim: self.head_dim,
            token_stride: self.token_stride,
        }
    }

    /// The slice from the first element on; tokens start `token_stride` apart.
    pub(crate) fn data_mut(&mut self) -> &mut [T] {
        self.data
    }
}

/// ndarray views in, this crate's views out. Only standard layout (row-major, contiguous) converts: nothing is copied.
#[cfg(feature = "ndarray")]
mod from_ndarray {
    use super::{Error, HeadsMut, HeadsRef, MatMut, MatRef, Result};
    use ndarray::{ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3};

    fn refused(what: &str) -> Error {
        Error::Unsupported {
            what: format!("{what} view with gaps or another memory order"),
            because: "only contiguous row-major arrays convert without a copy; call as_standard_layout() first".into(),
        }
    }

    macro_rules! convert {
        ($view:ident -> $ours:ident, $to_slice:ident, $what:literal, $($axis:ident),+) => {
            impl<'a, T> TryFrom<$view<'a, T>> for $ours<'a, T> {
                type Error = Error;

                #[doc = concat!("Borrows the ", $what, " at no copy; [`Error::Unsupported`] unless it is contiguous and row-major.")]
                fn try_from(a: $view<'a, T>) -> Result<Self> {
                    let ($($axis),+) = a.dim();
                    $ours::new(a.$to_slice().ok_or_else(|| refused($what))?, $($axis),+)
                }
            }
        };
    }

    convert!(ArrayView2 -> MatRef, to_slice, "matrix", rows, cols);
    convert!(ArrayViewMut2 -> MatMut, into_slice, "matrix", rows, cols);
    convert!(ArrayView3 -> HeadsRef, to_slice, "heads", tokens, heads, head_dim);
    convert!(ArrayViewMut3 -> HeadsMut, into_slice, "heads", tokens, heads, head_dim);
}
