//! A loaded program: tensors, ports and instructions, every reference and every static access already checked.
#![forbid(unsafe_code)]

use super::op::Op;
use crate::trainium::Dtype;

pub(super) use crate::trainium::Target;
pub(super) use crate::trainium::layout::PARTITIONS;

impl Target {
    /// Bytes of SBUF in one partition.
    pub(super) fn sbuf_bytes(self) -> usize {
        self.chip().sbuf_partition_bytes
    }

    /// Bytes of PSUM in one partition.
    pub(super) fn psum_bytes(self) -> usize {
        self.chip().psum_banks * self.chip().psum_bank_bytes
    }
}

/// Where a tensor lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Buffer {
    /// On chip, 128 partitions.
    Sbuf,
    /// On chip, where TensorE writes.
    Psum,
    /// Device memory of one core.
    PrivateHbm,
    /// Device memory that outputs live in.
    SharedHbm,
}

impl Buffer {
    /// The buffer called `name` in a program.
    pub fn by_name(name: &str) -> Option<Buffer> {
        match name {
            "sbuf" => Some(Buffer::Sbuf),
            "psum" => Some(Buffer::Psum),
            "private_hbm" => Some(Buffer::PrivateHbm),
            "shared_hbm" => Some(Buffer::SharedHbm),
            _ => None,
        }
    }

    /// Its name in a program.
    pub fn name(self) -> &'static str {
        match self {
            Buffer::Sbuf => "sbuf",
            Buffer::Psum => "psum",
            Buffer::PrivateHbm => "private_hbm",
            Buffer::SharedHbm => "shared_hbm",
        }
    }

    /// Whether axis 0 is the partition axis.
    pub fn on_chip(self) -> bool {
        matches!(self, Buffer::Sbuf | Buffer::Psum)
    }
}

/// Who executes an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Engine {
    /// The systolic array.
    Tensor,
    /// VectorE.
    Vector,
    /// ScalarE.
    Scalar,
    /// GpSimdE.
    Gpsimd,
    /// The DMA queues.
    Dma,
    /// Registers and synchronisation.
    Sync,
}

impl Engine {
    /// All of them.
    pub const ALL: [Engine; 6] =
        [Engine::Tensor, Engine::Vector, Engine::Scalar, Engine::Gpsimd, Engine::Dma, Engine::Sync];

    /// The engine called `name` in a program.
    pub fn by_name(name: &str) -> Option<Engine> {
        Engine::ALL.into_iter().find(|e| e.name() == name)
    }

    /// Its name in a program.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Tensor => "tensor",
            Engine::Vector => "vector",
            Engine::Scalar => "scalar",
            Engine::Gpsimd => "gpsimd",
            Engine::Dma => "dma",
            Engine::Sync => "sync",
        }
    }
}

/// A tensor: a row of bytes in HBM, or rows (partitions) of bytes on chip.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub(super) shape: Vec<usize>,
    pub(super) dtype: Dtype,
    pub(super) buffer: Buffer,
    pub(super) rows: usize,
    pub(super) row_bytes: usize,
    /// Partition and byte within it, if the kernel placed the tensor itself.
    pub(super) address: Option<(usize, usize)>,
    /// Contents of a constant.
    pub(super) data: Option<Vec<u8>>,
}

impl Tensor {
    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Where it lives.
    pub fn buffer(&self) -> Buffer {
        self.buffer
    }

    /// All its bytes.
    pub fn bytes(&self) -> usize {
        self.rows * self.row_bytes
    }

    /// First physical partition.
    pub(super) fn start_partition(&self) -> usize {
        self.address.map_or(0, |(partition, _)| partition)
    }
}

/// An input or output: a whole HBM tensor with a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Name: a kernel parameter, or `output_0`, `output_1`...
    pub name: String,
    /// Position in [`Program::tensors`].
    pub tensor: usize,
}

/// Where the runtime part of an address is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A 32-bit register.
    Register(usize),
    /// An integer tensor.
    Index(Box<Access>),
}

/// A runtime part of an address, in elements: one offset for all (`vector` false), or a row for each index along axis 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dynamic {
    /// Whether axis 0 is gathered.
    pub vector: bool,
    /// Elements that one step of the index spans.
    pub scale: usize,
    /// Indices of a gather are below this.
    pub extent: usize,
    /// Where the index is.
    pub source: Source,
}

/// Elements of a tensor: `offset + sum of index x stride`, in elements of `dtype` over its flat storage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Position in [`Program::tensors`].
    pub tensor: usize,
    /// The type the bytes are seen as.
    pub dtype: Dtype,
    /// First element.
    pub offset: usize,
    /// Stride and count of each axis, outermost (on chip: the partitions) first.
    pub dims: Vec<(usize, usize)>,
    /// What is known at run time only.
    pub dynamic: Option<Dynamic>,
}

impl Access {
    /// Count along axis 0: partitions on chip.
    pub fn partitions(&self) -> usize {
        self.dims.first().map_or(1, |d| d.1)
    }

    /// Elements for each index of axis 0.
    pub fn free(&self) -> usize {
        self.dims.iter().skip(1).map(|d| d.1).product()
    }

    /// All elements.
    pub fn count(&self) -> usize {
        self.partitions() * self.free()
    }
}

/// An access with its part in an instruction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operand {
    /// Its name: `dst`, `stationary`...
    pub role: &'static str,
    /// What it touches.
    pub access: Access,
    /// Whether the instruction writes it.
    pub written: bool,
}

/// One instruction.
#[derive(Debug, Clone, PartialEq)]
pub struct Instruction {
    pub(super) name: String,
    pub(super) engine: Engine,
    pub(super) operands: Vec<Operand>,
    pub(super) op: Op,
}

impl Instruction {
    /// NKI name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Who executes it.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// What it touches.
    pub fn operands(&self) -> &[Operand] {
        &self.operands
    }
}

/// A program that passed every check that can be made before it runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Program {
    pub(super) kernel: String,
    pub(super) example: String,
    pub(super) target: Target,
    pub(super) sources: Vec<(String, String)>,
    pub(super) parameters: Vec<(String, String)>,
    pub(super) tensors: Vec<Tensor>,
    pub(super) inputs: Vec<Port>,
    pub(super) outputs: Vec<Port>,
    pub(super) instructions: Vec<Instruction>,
    pub(super) registers: usize,
}

impl Program {
    /// Name of the kernel.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Name of the shape it was specialised for.
    pub fn example(&self) -> &str {
        &self.example
    }

    /// The device it is for.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Source files (relative to `kernels/`) with their sha256 in hexadecimal.
    pub fn sources(&self) -> &[(String, String)] {
        &self.sources
    }

    /// The compile-time arguments that the kernel was specialised for, by name, as text (`true`, `128`, `0.125`, `e2m1`).
    pub fn parameters(&self) -> &[(String, String)] {
        &self.parameters
    }

    /// The compile-time argument called `name`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// All tensors.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// What a run takes, in order.
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    /// What a run gives, in order.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    /// The instructions, in order.
    pub fn instructions(&self) -> &[Instruction] {
        &self.instructions
    }
}
