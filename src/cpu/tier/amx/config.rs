//! What LDTILECFG reads.

/// Palette 1: eight tiles of up to 16 rows of 64 bytes (Intel SDM vol. 1, section 18.2).
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl TileConfig {
    /// Eight tiles of 64-byte rows, so many each; a tile without rows must not be used.
    pub(super) fn new(rows: [u8; 8]) -> TileConfig {
        let mut config = TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (i, rows) in rows.into_iter().enumerate() {
            // A tile without rows must have no columns either.
            config.rows[i] = rows;
            config.row_bytes[i] = if rows == 0 { 0 } else { 64 };
        }
        config
    }
}
