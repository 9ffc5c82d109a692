//! Every golden file, case by case from its manifest; `TRN_KERNELS_GOLDEN` names another directory with the same files.

mod support;
#[path = "support/tiers.rs"]
mod tiers;

#[path = "golden_cases/attention.rs"]
mod attention;
#[path = "golden_cases/blocks.rs"]
mod blocks;
#[path = "golden_cases/compare.rs"]
mod compare;
#[path = "golden_cases/formats.rs"]
mod formats;
#[allow(dead_code)] // the tests use their part
#[path = "../examples/gpt_oss/mod.rs"]
mod gpt_oss;
#[path = "golden_cases/gpt_oss.rs"]
mod gpt_oss_cases;
#[path = "golden_cases/layer.rs"]
mod layer;
#[path = "golden_cases/layouts.rs"]
mod layouts;
#[path = "golden_cases/matmul.rs"]
mod matmul;
