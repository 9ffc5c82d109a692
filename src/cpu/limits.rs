//! What this machine can do at most, measured: the figures that a kernel's speed stands beside.
//!
//! Two limits: [`StreamRead`], bytes a second from memory, and [`Peak`], floating-point operations a second from registers. Both
//! run on every thread of the caller's pool at once, and count from the first thread's start to the last one's end. Measure them
//! between the calls they are compared with: the speed of a shared machine drifts by a factor of two within minutes.
#![forbid(unsafe_code)]

use super::tier::limits::{Block, Loop, cpu_name, read};
use crate::error::{Error, Result};
use memmap2::MmapMut;
use rayon::ThreadPool;
use std::collections::HashSet;
use std::fmt;
use std::hint::black_box;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Instant;

/// Version of this crate, for records of what was measured.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Runs `f` on every thread of a pool at once, one call of this in a process at a time: two that wait for each other's threads would
/// wait for ever, and would measure each other. Seconds from the first start to the last end.
fn at_once(pool: &ThreadPool, f: impl Fn(usize) + Sync) -> f64 {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let (threads, ready) = (pool.current_num_threads(), AtomicUsize::new(0));
    let spans = pool.broadcast(|context| {
        ready.fetch_add(1, SeqCst);
        let mut turns = 0u32;
        // Spins, because a thread that sleeps starts late and the limit would look lower than it is.
        while ready.load(SeqCst) < threads {
            turns += 1;
            if turns.is_multiple_of(1 << 10) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        let start = Instant::now();
        f(context.index());
        (start, Instant::now())
    });
    let first = spans.iter().map(|(start, _)| start).min();
    let last = spans.iter().map(|(_, end)| end).max();
    first.zip(last).map_or(0.0, |(first, last)| last.duration_since(*first).as_secs_f64()).max(1e-9)
}

/// How a read walks memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern {
    /// Sequential streams that a thread reads in step: 1, 2, 4, 8 or 16.
    pub streams: usize,
    /// Bytes that each stream is prefetched ahead, in whole blocks of 256; 0 leaves it to the hardware.
    pub ahead: usize,
}

impl Pattern {
    /// Those that [`StreamRead::tune`] tries.
    pub const ALL: [Pattern; 15] = {
        let (streams, ahead) = ([1, 2, 4, 8, 16], [0, 4 << 10, 16 << 10]);
        let mut all = [Pattern { streams: 1, ahead: 0 }; 15];
        let mut i = 0;
        while i < all.len() {
            all[i] = Pattern { streams: streams[i / 3], ahead: ahead[i % 3] };
            i += 1;
        }
        all
    };

    fn read(self, blocks: &[Block]) -> u64 {
        let ahead = self.ahead / size_of::<Block>();
        match self.streams {
            0 | 1 => read::<1>(blocks, ahead),
            2 | 3 => read::<2>(blocks, ahead),
            4..8 => read::<4>(blocks, ahead),
            8..16 => read::<8>(blocks, ahead),
            _ => read::<16>(blocks, ahead),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.streams == 1 { "" } else { "s" };
        write!(f, "{} stream{plural} a thread, ", self.streams)?;
        match self.ahead {
            0 => f.write_str("no prefetch"),
            ahead => write!(f, "prefetched {} KiB ahead", ahead >> 10),
        }
    }
}

/// Memory to read, more than four times the last-level caches of the machine, and the place where the next read starts.
#[derive(Debug)]
pub struct StreamRead {
    memory: MmapMut,
    next: usize,
    pattern: Pattern,
}

impl StreamRead {
    /// Maps the memory, by huge pages where the system gives them, and touches all of it from the threads that will read it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the system has not so much memory.
    pub fn new(pool: &ThreadPool) -> Result<Self> {
        let bytes = last_level_caches().saturating_mul(4).saturating_add(1).next_multiple_of(2 << 20);
        let refused = |e: std::io::Error| Error::Unsupported {
            what: format!("{bytes} bytes of memory to measure its bandwidth"),
            because: e.to_string(),
        };
        let mut memory = MmapMut::map_anon(bytes).map_err(refused)?;
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage); // a refusal costs time, nothing else
        let share = bytes.div_ceil(pool.current_num_threads()).next_multiple_of(2 << 20);
        pool.scope(|scope| memory.chunks_mut(share).for_each(|part| scope.spawn(|_| part.fill(1))));
        Ok(StreamRead { memory, next: 0, pattern: Pattern { streams: 8, ahead: 4 << 10 } })
    }

    /// Bytes mapped.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// The pattern in use.
    pub fn pattern(&self) -> Pattern {
        self.pattern
    }

    /// Tries every pattern on all of the memory, `rounds` times in turn, and keeps the one with the best median. Bytes a second
    /// of each, in the order of [`Pattern::ALL`].
    pub fn tune(&mut self, pool: &ThreadPool, rounds: usize) -> Vec<(Pattern, f64)> {
        let mut rates = vec![vec![]; Pattern::ALL.len()];
        for _ in 0..rounds.max(1) {
            for (rates, pattern) in rates.iter_mut().zip(Pattern::ALL) {
                self.pattern = pattern;
                rates.push(self.rate(pool, self.bytes()));
            }
        }
        let found: Vec<_> = Pattern::ALL.into_iter().zip(rates.iter_mut().map(|rates| median(rates))).collect();
        if let Some((best, _)) = found.iter().max_by(|a, b| a.1.total_cmp(&b.1)) {
            self.pattern = *best;
        }
        found
    }

    /// Reads at least `bytes` (at most all, and never less than 16 MiB) from where the last read ended, split over the threads of
    /// the pool. Bytes a second.
    pub fn rate(&mut self, pool: &ThreadPool, bytes: usize) -> f64 {
        let blocks: &[Block] = bytemuck::cast_slice(&self.memory);
        let threads = pool.current_num_threads();
        // Whole blocks for every stream of every thread, so that nothing is left over.
        let grain = 16 * threads;
        let wanted = bytes.max(16 << 20).div_ceil(size_of::<Block>()).next_multiple_of(grain);
        let count = wanted.min(blocks.len() / grain * grain);
        if count == 0 {
            return 0.0;
        }
        let start = if self.next + count > blocks.len() { 0 } else { self.next };
        self.next = start + count;
        let (part, pattern) = (count / threads, self.pattern);
        let seconds = at_once(pool, |thread| {
            black_box(pattern.read(&blocks[start + thread * part..][..part]));
        });
        (count * size_of::<Block>()) as f64 / seconds
    }
}

/// The fastest arithmetic of an instruction set, fed from registers alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Peak {
    /// f32 fused multiply-adds in 256-bit registers.
    Avx2F32,
    /// f32 fused multiply-adds in 512-bit registers.
    Avx512F32,
    /// bf16 products in pairs with f32 sums in 512-bit registers.
    Avx512Bf16,
    /// bf16 products with f32 sums in AMX tiles.
    AmxBf16,
}

impl Peak {
    /// All of them, ascending.
    pub const ALL: [Peak; 4] = [Peak::Avx2F32, Peak::Avx512F32, Peak::Avx512Bf16, Peak::AmxBf16];

    /// Name for tables.
    pub const fn name(self) -> &'static str {
        match self {
            Peak::Avx2F32 => "AVX2 FMA f32",
            Peak::Avx512F32 => "AVX-512 FMA f32",
            Peak::Avx512Bf16 => "AVX-512 bf16 pairs",
            Peak::AmxBf16 => "AMX bf16",
        }
    }

    fn detect(self) -> Result<Loop, &'static str> {
        match self {
            Peak::Avx2F32 => Loop::avx2(),
            Peak::Avx512F32 => Loop::avx512(),
            Peak::Avx512Bf16 => Loop::avx512_bf16(),
            Peak::AmxBf16 => Loop::amx(),
        }
    }

    /// Why this machine does not have it; `None` if it does.
    pub fn missing(self) -> Option<&'static str> {
        self.detect().err()
    }

    /// Runs it on every thread of the pool for about `seconds`. Floating-point operations a second; `None` if the machine does
    /// not have it.
    pub fn rate(self, pool: &ThreadPool, seconds: f64) -> Option<f64> {
        let work = self.detect().ok()?;
        let threads = pool.current_num_threads() as f64;
        let rate = |turns: usize| {
            let took = at_once(pool, |_| {
                black_box(work.run(turns));
            });
            (turns as f64 * work.flops as f64 * threads / took, took)
        };
        // Short runs tell how long a turn takes, and wake the wide units. The fastest, because one may have been interrupted.
        let took = (0..3).map(|_| rate(1 << 12).1).fold(f64::INFINITY, f64::min);
        let turns = (f64::from(1 << 12) * seconds / took).clamp(1.0, 1e12);
        Some(rate(turns as usize).0)
    }
}

impl fmt::Display for Peak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The CPU in words: the name it gives itself, family and model.
pub fn name() -> String {
    cpu_name()
}

/// Bytes of all last-level caches together: the sum over those that differ, as Linux tells them (`/sys/devices/system/cpu`).
/// Elsewhere 128 MiB, more than most machines have: too much memory read costs time, too little would measure a cache.
pub fn last_level_caches() -> usize {
    const ELSEWHERE: usize = 128 << 20;
    let mut seen = HashSet::new();
    let cpus = std::fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().flatten();
    let sizes = cpus.filter_map(|cpu| {
        let caches = std::fs::read_dir(cpu.path().join("cache")).ok()?.flatten();
        let caches = caches.filter_map(|cache| {
            let text = |name: &str| std::fs::read_to_string(cache.path().join(name)).ok();
            let level: u32 = text("level")?.trim().parse().ok()?;
            Some((level, text("shared_cpu_list")?, kibibytes(&text("size")?)?))
        });
        let (level, shared, bytes) = caches.max_by_key(|(level, ..)| *level)?;
        seen.insert((level, shared)).then_some(bytes)
    });
    match sizes.fold(0usize, usize::saturating_add) {
        0 => ELSEWHERE,
        bytes => bytes,
    }
}

/// `32768K` or `32M` in bytes.
fn kibibytes(size: &str) -> Option<usize> {
    let size = size.trim();
    let (digits, shift) = match size.strip_suffix('K') {
        Some(digits) => (digits, 10),
        None => (size.strip_suffix('M')?, 20),
    };
    digits.parse::<usize>().ok()?.checked_mul(1 << shift)
}

/// The median of what was measured: the middle one, or the mean of the two in the middle; 0 of nothing.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match (values.len().checked_sub(1).map(|last| last / 2), values.len() / 2) {
        (Some(low), high) => (values[low] + values[high]) / 2.0,
        (None, _) => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn reads_walk_all_of_the_memory() {
        let pool = pool(3);
        let mut read = StreamRead::new(&pool).unwrap();
        assert!(read.bytes() > 4 * last_level_caches());
        let found = read.tune(&pool, 1);
        assert_eq!(found.len(), Pattern::ALL.len());
        // How fast is not asked: a test machine may be busy.
        let best = found.iter().map(|f| f.1).fold(0.0, f64::max);
        assert!(found.iter().any(|f| f.0 == read.pattern() && f.1 == best), "{found:?}");
        assert!(found.iter().all(|f| f.1 > 0.0 && f.1.is_finite()), "{found:?}");
        // Reads go on where the last one ended, and begin again before the end.
        let before = read.next;
        assert!(read.rate(&pool, 0) > 0.0 && read.next != before);
        for _ in 0..2 {
            assert!(read.rate(&pool, usize::MAX >> 1) > 0.0);
            assert!(read.next * size_of::<Block>() <= read.bytes());
        }
    }

    #[test]
    fn peaks_are_there_or_missing_for_a_reason() {
        let pool = pool(2);
        for peak in Peak::ALL {
            match (peak.rate(&pool, 1e-3), peak.missing()) {
                (Some(rate), None) => assert!(rate > 0.0 && rate.is_finite(), "{peak}: {rate}"),
                (None, Some(reason)) => assert!(!reason.is_empty(), "{peak}"),
                other => panic!("{peak}: {other:?}"),
            }
        }
        assert!(!name().is_empty());
    }

    #[test]
    fn cache_sizes_are_read() {
        assert_eq!((kibibytes("32768K\n"), kibibytes("8M")), (Some(32 << 20), Some(8 << 20)));
        assert_eq!((kibibytes("8"), kibibytes("K"), kibibytes("99999999999999999999K")), (None, None, None));
        assert_eq!((median(&mut [3.0, 1.0, 2.0]), median(&mut [])), (2.0, 0.0));
        assert_eq!((median(&mut [5.0]), median(&mut [4.0, 1.0, 2.0, 9.0])), (5.0, 3.0));
    }
}
