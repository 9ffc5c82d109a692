//! What a backend keeps, by id.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};

macro_rules! ids {
    ($($name:ident, $what:literal;)*) => {$(
        #[doc = concat!("A ", $what, " that a backend was given.")]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name(usize);

        impl Id for $name {
            const WHAT: &'static str = $what;
            fn new(index: usize) -> Self {
                $name(index)
            }
            fn index(self) -> usize {
                self.0
            }
        }
    )*};
}

/// A number under which something is kept.
pub(super) trait Id: Copy {
    const WHAT: &'static str;
    fn new(index: usize) -> Self;
    fn index(self) -> usize;
}

ids! {
    MatrixId, "weight matrix";
    ExpertsId, "layer of experts";
    AttentionId, "attention";
    CacheId, "kv cache";
}

/// Things of one kind, by id.
#[derive(Debug)]
pub(super) struct Store<T>(Vec<T>);

impl<T> Default for Store<T> {
    fn default() -> Self {
        Store(Vec::new())
    }
}

impl<T> Store<T> {
    pub(super) fn add<I: Id>(&mut self, value: T) -> I {
        self.0.push(value);
        I::new(self.0.len() - 1)
    }

    pub(super) fn get<I: Id>(&self, id: I) -> Result<&T> {
        self.0.get(id.index()).ok_or_else(|| foreign(id, self.0.len()))
    }

    pub(super) fn get_mut<I: Id>(&mut self, id: I) -> Result<&mut T> {
        let limit = self.0.len();
        self.0.get_mut(id.index()).ok_or_else(|| foreign(id, limit))
    }
}

fn foreign<I: Id>(id: I, limit: usize) -> Error {
    Error::index(I::WHAT, 0, id.index(), limit)
}
