//! Attention: ragged prefill, paged prefill (chunks after an append) and paged decode, with causal and sliding-window masks, sinks,
//! soft cap, grouped heads, log-sum-exps and merging of states.
//!
//! One routine computes all of them: a token's output has the same bits from one prefill, chunked prefill or decode, at any batch,
//! page order and thread count, as long as the cache stores the same values. Its arithmetic and error bound are in
//! docs/numerics.md; [`oracle`] is the plain f64 definition.
#![forbid(unsafe_code)]

mod bound;
mod core;
mod decode;
mod driver;
mod merge;
pub mod oracle;
mod prefill;
mod softmax;
mod source;
mod spec;
#[cfg(test)]
mod tests;

pub use decode::{DecodePlan, plan_decode};
pub use driver::AttentionOut;
pub use merge::{PartialState, apply_sinks, merge_states};
pub use prefill::Queries;
pub use source::RaggedKv;
pub use spec::{AttentionSpec, KV_SECTION, KV_TILE};
