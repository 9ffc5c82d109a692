//! Threads are the caller's: a pool it lends, the pool it is in, or none.
#![forbid(unsafe_code)]

use std::fmt;

/// Who runs the parts of a call.
#[derive(Clone, Copy, Default)]
#[non_exhaustive]
pub enum Parallelism<'pool> {
    /// The calling thread alone.
    #[default]
    Serial,
    /// The threads of this pool.
    #[cfg(feature = "rayon")]
    Pool(&'pool rayon::ThreadPool),
    /// The rayon pool the calling thread belongs to. Outside any pool that is rayon's global one: asking for it is the caller's
    /// choice, the crate never does by itself.
    #[cfg(feature = "rayon")]
    CurrentPool,
    #[cfg(not(feature = "rayon"))]
    #[doc(hidden)]
    Never(std::convert::Infallible, std::marker::PhantomData<&'pool ()>),
}

impl fmt::Debug for Parallelism<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} threads", self.threads())
    }
}

impl Parallelism<'_> {
    /// Number of threads a call is split over.
    pub fn threads(&self) -> usize {
        match self {
            Parallelism::Serial => 1,
            #[cfg(feature = "rayon")]
            Parallelism::Pool(pool) => pool.current_num_threads(),
            #[cfg(feature = "rayon")]
            Parallelism::CurrentPool => rayon::current_num_threads(),
            #[cfg(not(feature = "rayon"))]
            Parallelism::Never(never, _) => match *never {},
        }
    }

    /// Runs `f` on a thread of the pool: from there a fork wakes the other threads only.
    pub(crate) fn enter<R: Send>(self, f: impl FnOnce() -> R + Send) -> R {
        match self {
            #[cfg(feature = "rayon")]
            Parallelism::Pool(pool) => pool.install(f),
            #[cfg(feature = "rayon")]
            Parallelism::CurrentPool => rayon::scope(|_| f()),
            _ => f(),
        }
    }
}

/// Runs `f(i, a_i, b_i)` for the i-th chunk of `a` and of `b`, in any order, on the given threads; a single chunk on the calling
/// one.
pub(crate) fn for_each_zip<A: Send, B: Send>(
    parallelism: Parallelism<'_>,
    (a, a_chunk): (&mut [A], usize),
    (b, b_chunk): (&mut [B], usize),
    f: impl Fn(usize, &mut [A], &mut [B]) + Sync,
) {
    let (a_chunk, b_chunk) = (a_chunk.max(1), b_chunk.max(1));
    #[cfg(feature = "rayon")]
    {
        use rayon::prelude::*;
        if parallelism.threads() > 1 && a.len() > a_chunk && b.len() > b_chunk {
            return parallelism.enter(|| {
                let pairs = a.par_chunks_mut(a_chunk).zip(b.par_chunks_mut(b_chunk));
                pairs.enumerate().for_each(|(i, (a, b))| f(i, a, b));
            });
        }
    }
    let _ = parallelism;
    for (i, (a, b)) in a.chunks_mut(a_chunk).zip(b.chunks_mut(b_chunk)).enumerate() {
        f(i, a, b);
    }
}

/// Runs `f(i, a_i)` for the i-th chunk of `a`, as [`for_each_zip`].
pub(crate) fn for_each<A: Send>(
    parallelism: Parallelism<'_>,
    (a, chunk): (&mut [A], usize),
    f: impl Fn(usize, &mut [A]) + Sync,
) {
    // `()` takes no memory: the second slice is there because the splitter walks two.
    let mut parts = vec![(); a.len().div_ceil(chunk.max(1))];
    for_each_zip(parallelism, (a, chunk), (&mut parts, 1), |i, a, _| f(i, a));
}
