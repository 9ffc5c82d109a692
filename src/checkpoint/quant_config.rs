//! What `config.json` and `hf_quant_config.json` say about quantization, as far as tensors alone do not.
#![forbid(unsafe_code)]

use super::bad;
use crate::error::Result;
use serde_json::Value;

/// Layouts that compressed-tensors names in `format`.
pub(super) const NVFP4: &str = "nvfp4-pack-quantized";
pub(super) const MXFP4: &str = "mxfp4-pack-quantized";
pub(super) const MXFP8: &str = "mxfp8-quantized";
pub(super) const FLOAT: &str = "float-quantized";

/// The facts a loader needs.
#[derive(Debug, Default)]
pub(super) struct QuantConfig {
    /// `format`, with the file that said so.
    format: Option<(String, String)>,
    /// `weight_block_size`: rows and columns of an FP8 scale tile.
    weight_block: Option<(usize, usize)>,
}

impl QuantConfig {
    /// Takes in a whole `config.json` (`quantization_config`) or `hf_quant_config.json` (`quantization`).
    pub(super) fn absorb(&mut self, at: &str, json: &Value) -> Result<()> {
        for section in ["quantization_config", "quantization"] {
            let q = &json[section];
            if let Some(format) = q["format"].as_str() {
                self.format = Some((format.into(), at.into()));
            }
            if !q["weight_block_size"].is_null() {
                self.weight_block = Some(block(&q["weight_block_size"]).ok_or_else(|| {
                    let got = &q["weight_block_size"];
                    bad(format!("{at}: {section}.weight_block_size"), format!("is {got}, needed two sizes above 0"))
                })?);
            }
            if q["quant_algo"].as_str() == Some("NVFP4") {
                let group = &q["group_size"];
                if !group.is_null() && group.as_u64() != Some(16) {
                    return Err(bad(format!("{at}: {section}.group_size"), format!("is {group}, NVFP4 needs 16")));
                }
            }
        }
        Ok(())
    }

    /// Rows and columns of an FP8 scale tile: what the config says, else DeepSeek's 128 x 128.
    pub(super) fn weight_block(&self) -> (usize, usize) {
        self.weight_block.unwrap_or((128, 128))
    }

    /// Whether the config names the tile.
    pub(super) fn has_weight_block(&self) -> bool {
        self.weight_block.is_some()
    }

    /// Asks that the layout in which `prefix` is stored be the one that the config names, if it names one for all layers.
    pub(super) fn expect(&self, prefix: &str, layout: &str) -> Result<()> {
        match &self.format {
            Some((format, at)) if [NVFP4, MXFP4, MXFP8, FLOAT].contains(&format.as_str()) && format != layout => {
                Err(bad(
                    format!("{at}: quantization_config.format"),
                    format!("is {format}, but {prefix} is stored as {layout}"),
                ))
            }
            _ => Ok(()),
        }
    }
}

fn block(value: &Value) -> Option<(usize, usize)> {
    let sizes: Vec<usize> =
        value.as_array()?.iter().map(|v| v.as_u64().and_then(|v| v.try_into().ok())).collect::<Option<_>>()?;
    match *sizes {
        [n, k] if n > 0 && k > 0 => Some((n, k)),
        _ => None,
    }
}
