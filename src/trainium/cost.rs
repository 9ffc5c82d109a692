//! What a chip would take for a program: a model from documented constants, not a measurement.
//!
//! Every engine works through its own instructions in program order, but DMA: a transfer takes the queue of [`DMA_QUEUES`]
//! that is free first and then shares the bandwidth, so that a store that waits for its data does not hold up later loads.
//! An instruction starts when its engine is free and the instructions whose bytes it reads or overwrites are done; engines
//! overlap otherwise. Durations follow the constants of [`Chip`]:
//!
//! * TensorE: a matmul of N moving columns takes `max(N, 64)` cycles (four times that for f32), or the loading of its
//!   stationary operand if that is longer: the load overlaps the matmul before it. A transpose is a matmul of its rows; that
//!   NeuronCore-v4 runs transposes behind other matmuls is not modelled.
//! * VectorE, ScalarE, GpSimdE: elements of the widest operand in one partition over the engine's elements a cycle, twice for
//!   two input tiles, at least the issue interval; a result can be used some cycles later (`small`). `quantize_mx` takes four
//!   input elements a cycle, VectorE's `reciprocal` eight cycles an element, its `exponential` a quarter of ScalarE's time.
//! * DMA: bytes over the bandwidth of the core's DMA engines (its share of the HBM, if HBM is involved); a contiguous piece shorter than [`Dma::efficient_bytes`](super::chip::Dma::efficient_bytes) is charged as if it were that
//!   long, up to [`SHORT_PIECES`] times its bytes; a result can be used `fixed` seconds later.
//!
//! Dependencies are found by the rectangle of partitions and bytes that an operand spans, so interleaved operands may seem to
//! depend on each other where they do not.
#![forbid(unsafe_code)]

use super::chip::{Chip, LaneEngine, MatmulMode};
use super::emulator::{Access, Buffer, Dtype, Engine, Instruction, Operand, Program, Source};
use std::fmt;

/// How much slower than its bytes a transfer of short pieces is taken to be at most: the documents call pieces of less than
/// 256 bytes "very poor" and give no figure; this is the ratio of the recommended least, 2 KiB, to a quarter of it.
pub const SHORT_PIECES: f64 = 4.0;

/// Queues of a DMA engine; one transfer uses the same queue of all engines (NKI DMA overview).
pub const DMA_QUEUES: usize = 16;

/// When one instruction works, in seconds from the start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// Who works.
    pub engine: Engine,
    /// From when.
    pub start: f64,
    /// Until when it keeps its engine, or its DMA queue.
    pub end: f64,
    /// Seconds of work: less than from `start` to `end` for a transfer that shared the bandwidth.
    pub work: f64,
    /// From when its result can be used.
    pub ready: f64,
    /// The instruction that it had to wait for, if it waited: the last one to finish.
    pub after: Option<usize>,
}

/// The modelled run of a program on one core.
#[derive(Debug, Clone, PartialEq)]
pub struct Cost {
    /// Seconds until the last result is there.
    pub seconds: f64,
    /// One span for each instruction, in program order.
    pub spans: Vec<Span>,
    /// Floating-point operations of the matmuls (transposes not counted): two for each product.
    pub flops: f64,
    /// Bytes read from and written to HBM.
    pub hbm_bytes: u64,
    /// Seconds that the matmuls alone would take at the peak rate of their modes.
    pub ideal_matmul: f64,
    /// Seconds that the HBM bytes alone would take at the core's bandwidth.
    pub ideal_hbm: f64,
}

impl Cost {
    /// Seconds an engine works.
    pub fn busy(&self, engine: Engine) -> f64 {
        self.spans.iter().filter(|s| s.engine == engine).map(|s| s.work).sum()
    }

    /// Share of the run in which an engine works, 0 to 1.
    pub fn share(&self, engine: Engine) -> f64 {
        if self.seconds > 0.0 { self.busy(engine) / self.seconds } else { 0.0 }
    }

    /// The instructions that determine how long the run takes, first to last: each waited for the one before it.
    pub fn critical_path(&self) -> Vec<usize> {
        let last = (0..self.spans.len()).max_by(|&a, &b| self.spans[a].ready.total_cmp(&self.spans[b].ready));
        let mut path: Vec<usize> = std::iter::successors(last, |&i| self.spans[i].after).collect();
        path.reverse();
        path
    }

    /// How close the run comes to what bounds it, the matmuls at peak or the HBM at its bandwidth: 0 to 1.
    pub fn share_of_roofline(&self) -> f64 {
        if self.seconds > 0.0 { self.ideal_matmul.max(self.ideal_hbm) / self.seconds } else { 0.0 }
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "modelled time {:.2} us (from documented constants, not measured)", 1e6 * self.seconds)?;
        for engine in Engine::ALL {
            let n = self.spans.iter().filter(|s| s.engine == engine).count();
            if n > 0 {
                let (busy, share) = (1e6 * self.busy(engine), 100.0 * self.share(engine));
                writeln!(f, "  {:<7} {n:>6} instructions {busy:>10.2} us busy {share:>5.1} %", engine.name())?;
            }
        }
        let (tensor, hbm) = (1e6 * self.ideal_matmul, 1e6 * self.ideal_hbm);
        write!(
            f,
            "  bounds: matmuls at peak {tensor:.2} us, HBM {hbm:.2} us: {:.1} %",
            100.0 * self.share_of_roofline()
        )
    }
}

/// Models a run of `program` on one core of `chip`, which need not be the chip that the program was made for.
///
/// Where the chip lacks a matmul mode, the mode's cycles are counted all the same.
pub fn estimate(program: &Program, chip: &Chip) -> Cost {
    let mut model = Model {
        chip,
        program,
        free: [(0.0, None); Engine::ALL.len()],
        queues: [(0.0, None); DMA_QUEUES],
        link: Link::default(),
        touched: vec![vec![]; program.tensors().len()],
        cost: Cost { seconds: 0.0, spans: vec![], flops: 0.0, hbm_bytes: 0, ideal_matmul: 0.0, ideal_hbm: 0.0 },
    };
    for instruction in program.instructions() {
        model.step(instruction);
    }
    let mut cost = model.cost;
    cost.ideal_hbm = cost.hbm_bytes as f64 / chip.core_bandwidth();
    cost
}

/// The bandwidth of DMA: when it is in use, ascending and apart.
#[derive(Debug, Default)]
struct Link {
    busy: Vec<(f64, f64)>,
}

impl Link {
    /// Gives a transfer the first `seconds` that are left from `from` on; returns its beginning and end.
    fn carry(&mut self, from: f64, seconds: f64) -> (f64, f64) {
        let (mut at, mut left, mut start) = (from, seconds, None);
        let mut used = vec![];
        for &(begin, end) in self.busy.iter().filter(|b| b.1 > from) {
            let gap = (begin - at).min(left);
            if gap > 0.0 {
                start.get_or_insert(at);
                used.push((at, at + gap));
                left -= gap;
                if left <= 0.0 {
                    break;
                }
            }
            at = at.max(end);
        }
        if left > 0.0 {
            start.get_or_insert(at);
            used.push((at, at + left));
        }
        let (start, end) = (start.unwrap_or(from), used.last().map_or(from, |u| u.1));
        self.busy.extend(used);
        self.busy.sort_by(|a, b| a.0.total_cmp(&b.0));
        self.busy.dedup_by(|next, before| {
            let joined = next.0 <= before.1;
            if joined {
                before.1 = before.1.max(next.1);
            }
            joined
        });
        (start, end)
    }
}

/// Partitions and bytes in each that an access spans, half open.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Rectangle {
    partitions: (usize, usize),
    bytes: (usize, usize),
}

impl Rectangle {
    fn meets(&self, other: &Rectangle) -> bool {
        let overlap = |a: (usize, usize), b: (usize, usize)| a.0 < b.1 && b.0 < a.1;
        overlap(self.partitions, other.partitions) && overlap(self.bytes, other.bytes)
    }

    fn covers(&self, other: &Rectangle) -> bool {
        let inside = |a: (usize, usize), b: (usize, usize)| a.0 <= b.0 && b.1 <= a.1;
        inside(self.partitions, other.partitions) && inside(self.bytes, other.bytes)
    }
}

/// Who touched a piece of a tensor.
#[derive(Debug, Clone, Copy)]
struct Touch {
    at: Rectangle,
    instruction: usize,
    written: bool,
}

struct Model<'a> {
    chip: &'a Chip,
    program: &'a Program,
    /// When each engine is free, and its last instruction.
    free: [(f64, Option<usize>); Engine::ALL.len()],
    /// The same of each DMA queue.
    queues: [(f64, Option<usize>); DMA_QUEUES],
    link: Link,
    touched: Vec<Vec<Touch>>,
    cost: Cost,
}

impl Model<'_> {
    fn step(&mut self, instruction: &Instruction) {
        let index = self.cost.spans.len();
        let engine = instruction.engine();
        let server = self.server(engine);
        let (mut start, mut after) = *server;
        let touches = self.touches(instruction);
        for (tensor, touch) in &touches {
            for earlier in &self.touched[*tensor] {
                let ready = self.cost.spans[earlier.instruction].ready;
                if ready > start && (touch.written || earlier.written) && touch.at.meets(&earlier.at) {
                    // TensorE adds into PSUM in order, without waiting for its own results.
                    if engine == Engine::Tensor && self.cost.spans[earlier.instruction].engine == engine {
                        continue;
                    }
                    (start, after) = (ready, Some(earlier.instruction));
                }
            }
        }
        let (work, latency) = self.duration(instruction);
        let mut end = start + work;
        if engine == Engine::Dma {
            let wanted = start;
            (start, end) = self.link.carry(wanted, work);
            if start > wanted {
                let before = |i: &usize| self.cost.spans[*i].engine == engine && self.cost.spans[*i].end <= start;
                let ends = |i: usize| self.cost.spans[i].end;
                after = (0..index).filter(before).max_by(|&a, &b| ends(a).total_cmp(&ends(b))).or(after);
            }
        }
        let span = Span { engine, start, end, work, ready: end + latency, after };
        *self.server(engine) = (end, Some(index));
        self.cost.seconds = self.cost.seconds.max(span.ready);
        self.cost.spans.push(span);
        for (tensor, touch) in touches {
            let list = &mut self.touched[tensor];
            if touch.written {
                // Whoever comes later waits for this write, which waited for what it covers.
                list.retain(|earlier| !touch.at.covers(&earlier.at));
            }
            list.push(Touch { instruction: index, ..touch });
        }
    }

    /// What serves the engine's next instruction: the engine itself, or the DMA queue that is free first.
    fn server(&mut self, engine: Engine) -> &mut (f64, Option<usize>) {
        let position = Engine::ALL.iter().position(|e| *e == engine).unwrap_or_default();
        let first = (0..DMA_QUEUES).min_by(|&a, &b| self.queues[a].0.total_cmp(&self.queues[b].0)).unwrap_or_default();
        if engine == Engine::Dma { &mut self.queues[first] } else { &mut self.free[position] }
    }

    /// The pieces of tensors that an instruction touches, the indices of gathers among them.
    fn touches(&self, instruction: &Instruction) -> Vec<(usize, Touch)> {
        let mut out = vec![];
        for operand in instruction.operands() {
            let access = &operand.access;
            out.push((access.tensor, Touch { at: self.rectangle(access), instruction: 0, written: operand.written }));
            if let Some(Source::Index(index)) = access.dynamic.as_ref().map(|d| &d.source) {
                out.push((index.tensor, Touch { at: self.rectangle(index), instruction: 0, written: false }));
            }
        }
        out
    }

    fn rectangle(&self, access: &Access) -> Rectangle {
        let tensor = &self.program.tensors()[access.tensor];
        if access.dynamic.is_some() {
            return Rectangle { partitions: (0, usize::MAX), bytes: (0, tensor.bytes()) };
        }
        let size = access.dtype.size();
        let span = |dims: &[(usize, usize)]| dims.iter().map(|(stride, n)| stride * (n - 1)).sum::<usize>() + 1;
        if !tensor.buffer().on_chip() {
            let first = access.offset * size;
            return Rectangle { partitions: (0, 1), bytes: (first, first + span(&access.dims) * size) };
        }
        let row = tensor.bytes() / tensor.shape()[0] / size;
        let (partition, first) = (access.offset / row, access.offset % row * size);
        let last = partition + access.dims[0].0 / row * (access.dims[0].1 - 1);
        Rectangle { partitions: (partition, last + 1), bytes: (first, first + span(&access.dims[1..]) * size) }
    }

    fn buffer(&self, operand: &Operand) -> Buffer {
        self.program.tensors()[operand.access.tensor].buffer()
    }

    /// Seconds an instruction keeps its engine busy, and seconds more until its result can be used.
    fn duration(&mut self, instruction: &Instruction) -> (f64, f64) {
        let chip = self.chip;
        match instruction.engine() {
            Engine::Tensor => (self.matmul(instruction), 0.0),
            Engine::Vector => self.lanes(instruction, &chip.vector),
            Engine::Scalar => self.lanes(instruction, &chip.scalar),
            Engine::Gpsimd => self.lanes(instruction, &chip.gpsimd),
            Engine::Dma => (self.transfer(instruction), chip.dma.fixed),
            Engine::Sync => (chip.scalar.issue / chip.scalar.clock, 0.0),
        }
    }

    fn matmul(&mut self, instruction: &Instruction) -> f64 {
        let tensor = &self.chip.tensor;
        let find = |role: &str| instruction.operands().iter().find(|o| o.role == role).map(|o| &o.access);
        if let Some(data) = find("data") {
            // A transpose: the data is stationary and an identity of its partitions moves past it.
            let cycles = tensor.transpose_cycles(data.dtype.size() == 4, data.partitions());
            let cycles = cycles.max(tensor.load_cycles(data.free()));
            return cycles / tensor.clock;
        }
        let (Some(dst), Some(stationary), Some(moving)) = (find("dst"), find("stationary"), find("moving")) else {
            return 0.0;
        };
        let columns = dst.free();
        let depth = stationary.free() / dst.partitions().max(1);
        let mode = match (stationary.dtype, depth) {
            (d, _) if d.is_packed() => MatmulMode::Mx,
            (Dtype::Float32 | Dtype::Tfloat32, _) => MatmulMode::F32,
            (d, 2..) if d.fp8().is_some() => MatmulMode::Fp8DoubleRow,
            (d, _) if d.fp8().is_some() => MatmulMode::Fp8,
            _ => MatmulMode::Bf16,
        };
        let products = (moving.partitions() * mode.k_per_partition() * dst.partitions() * columns) as f64;
        self.cost.flops += 2.0 * products;
        self.cost.ideal_matmul += tensor.peak_flops(mode).map_or(0.0, |peak| 2.0 * products / peak);
        tensor.moving_cycles(mode, columns).max(tensor.load_cycles(dst.partitions())) / tensor.clock
    }

    fn lanes(&self, instruction: &Instruction, engine: &LaneEngine) -> (f64, f64) {
        let operands = instruction.operands();
        let widest = operands.iter().map(|o| o.access.free()).max().unwrap_or(0) as f64;
        let tiles = operands.iter().filter(|o| !o.written && o.access.free() > 1).count();
        let fast = operands.iter().filter(|o| o.access.free() > 1).all(|o| {
            let contiguous = o.access.dims.last().is_none_or(|d| d.0 == 1);
            contiguous && matches!(o.access.dtype, Dtype::Bfloat16 | Dtype::Float16) && self.buffer(o) == Buffer::Sbuf
        });
        let rate = if fast { engine.elements_16 } else { engine.elements };
        let cycles = match instruction.name() {
            "quantize_mx" => widest / 4.0,
            "reciprocal" if instruction.engine() == Engine::Vector => 8.0 * widest,
            "exponential" => {
                let scalar = &self.chip.scalar;
                widest / scalar.elements / 4.0 * engine.clock / scalar.clock
            }
            _ => widest / rate * tiles.clamp(1, 2) as f64,
        };
        (cycles.max(engine.issue) / engine.clock, engine.small / engine.clock)
    }

    fn transfer(&mut self, instruction: &Instruction) -> f64 {
        let (mut moved, mut in_hbm, mut longest) = (0usize, false, 1.0f64);
        for operand in instruction.operands() {
            let access = &operand.access;
            let bytes = access.count() * access.dtype.size();
            moved = moved.max(bytes);
            if !self.buffer(operand).on_chip() {
                in_hbm = true;
                self.cost.hbm_bytes += bytes as u64;
            }
            let piece = contiguous(access, self.buffer(operand).on_chip()) * access.dtype.size();
            longest = longest.max(self.chip.dma.efficient_bytes as f64 / piece as f64);
        }
        let rate = if in_hbm { self.chip.core_bandwidth() } else { self.chip.dma.bandwidth() };
        moved as f64 * longest.min(SHORT_PIECES) / rate
    }
}

/// Elements that lie next to each other; a partition or a gathered row ends a piece.
fn contiguous(access: &Access, on_chip: bool) -> usize {
    let rows = on_chip || access.dynamic.as_ref().is_some_and(|d| d.vector);
    let mut piece = 1;
    for &(stride, n) in access.dims.iter().skip(usize::from(rows)).rev() {
        if n == 1 {
            continue;
        }
        if stride != piece {
            break;
        }
        piece *= n;
    }
    piece
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfers_fill_the_gaps_that_are_left() {
        let mut link = Link::default();
        assert_eq!(link.carry(0.0, 1.0), (0.0, 1.0));
        assert_eq!(link.carry(5.0, 1.0), (5.0, 6.0));
        assert_eq!(link.carry(0.0, 2.0), (1.0, 3.0), "after the first, before the second");
        assert_eq!(link.carry(2.0, 3.0), (3.0, 7.0), "around the second");
        assert_eq!(link.busy, vec![(0.0, 7.0)]);
        assert_eq!(link.carry(8.0, 0.0), (8.0, 8.0));
    }
}
