//! The KV cache: formats, pages, page tables, the pool that owns them, appending.
//!
//! Pages hold `[page_size, num_kv_heads, head_dim]` of K and of V. Quantization blocks run along head_dim, so a token is sealed
//! when it is appended: any chunking of appends gives the same bytes.
#![forbid(unsafe_code)]

mod append;
mod encode;
mod format;
mod page_table;
mod paged;
mod pages;
mod pool;
mod sequence;

pub use append::append_kv;
pub(crate) use format::nvfp4_scale;
pub use format::{KvFormat, KvScale};
pub use page_table::PageTable;
pub(crate) use page_table::check_indptr;
pub use paged::{KvPlane, KvShape, PagedKv};
pub use pages::PageAllocator;
pub use pool::{KvConfig, KvPool};
pub use sequence::KvSequence;
