//! The roofline as a picture: what the machine could do at each intensity, and what was done.
#![forbid(unsafe_code)]

use super::table::{Origin, Row};
use crate::failure::Failure;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use trn_kernels::cpu::limits::{Peak, median};

const SIZE: (u32, u32) = (1100, 720);
const FONT: &str = "sans-serif";
/// Okabe and Ito's colours, which colour-blind readers tell apart.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(120, 120, 120),
];

/// The picture, well-formed SVG.
pub(crate) fn svg(rows: &[Row], origin: &Origin) -> Result<String, Failure> {
    let mut out = String::new();
    draw(&mut out, rows, origin).map_err(|e| Failure::refused(format!("roofline: {e}")))?;
    Ok(out)
}

/// Ends of an axis that holds all values with room to spare, whole powers of ten.
fn decades(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (mut low, mut high) = (f64::INFINITY, 0.0f64);
    values.filter(|v| v.is_finite() && *v > 0.0).for_each(|v| (low, high) = (low.min(v), high.max(v)));
    if high == 0.0 {
        return (1.0, 10.0);
    }
    let (low, high) = ((0.8 * low).log10().floor(), (1.25 * high).log10().ceil());
    (10f64.powf(low), 10f64.powf(high.max(low + 1.0)))
}

fn draw(out: &mut String, rows: &[Row], origin: &Origin) -> Result<(), Box<dyn std::error::Error>> {
    let read = median(&mut rows.iter().map(|r| r.outcome.read).collect::<Vec<_>>()) / 1e9;
    let peaks = Peak::ALL.into_iter().filter_map(|peak| {
        let beside = rows.iter().filter(|r| r.peak == Some(peak)).filter_map(|r| r.outcome.peak);
        let mut beside: Vec<f64> = beside.collect();
        (!beside.is_empty()).then(|| (peak, median(&mut beside) / 1e9))
    });
    let peaks: Vec<_> = peaks.collect();
    let top = peaks.iter().map(|(_, peak)| *peak).fold(0.0, f64::max);
    let intensity = |row: &Row| row.outcome.flops / row.outcome.bytes as f64;
    let reached = |row: &Row| row.outcome.flops_per_second() / 1e9;
    let ridge = if top > 0.0 { top / read } else { 1.0 };
    let (left, right) = decades(rows.iter().map(intensity).chain([ridge]));
    let (bottom, above) = decades(rows.iter().map(reached).chain(peaks.iter().map(|p| p.1)).chain([left * read]));

    let root = SVGBackend::with_string(out, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let text = |size: i32| (FONT, size).into_font().color(&BLACK);
    root.draw(&Text::new("Matmul on the roofline of this machine", (20, 10), text(22)))?;
    let what = format!("{origin}; limits measured beside each call, medians");
    root.draw(&Text::new(what, (20, 38), text(15)))?;
    let mut chart = ChartBuilder::on(&root)
        .margin_top(70)
        .margin_right(190)
        .margin_bottom(10)
        .x_label_area_size(50)
        .y_label_area_size(80)
        .build_cartesian_2d((left..right).log_scale(), (bottom..above).log_scale())?;
    chart
        .configure_mesh()
        .x_desc("FLOP for each byte of weights")
        .y_desc("GFLOP/s")
        .light_line_style(WHITE)
        .label_style(text(14))
        .draw()?;

    // Roofs: memory up to each peak, then the peak.
    for (peak, height) in &peaks {
        let turn = (height / read).clamp(left, right);
        let line = [(left, left * read), (turn, (turn * read).min(*height)), (right, *height)];
        chart.draw_series([PathElement::new(line, BLACK.stroke_width(2))])?;
        let label = format!("{peak} {height:.0} GFLOP/s");
        let style = text(14).pos(Pos::new(HPos::Right, VPos::Bottom));
        chart.draw_series([Text::new(label, (right, *height), style)])?;
    }
    if peaks.is_empty() {
        let end = right.min(above / read);
        chart.draw_series([PathElement::new([(left, left * read), (end, end * read)], BLACK.stroke_width(2))])?;
    }
    let style = text(14).pos(Pos::new(HPos::Left, VPos::Top));
    chart.draw_series([Text::new(format!("read {read:.1} GB/s"), (left * 1.1, left * read), style)])?;

    let mut schemes: Vec<&str> = vec![];
    rows.iter().for_each(|row| {
        if !schemes.contains(&row.scheme.as_str()) {
            schemes.push(&row.scheme);
        }
    });
    for (number, scheme) in schemes.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let points =
            || rows.iter().filter(|row| row.scheme == *scheme).map(|row| (row, (intensity(row), reached(row))));
        let dense = points().filter(|(row, _)| row.experts.is_none());
        chart.draw_series(dense.map(|(_, at)| Circle::new(at, 5, colour.filled())))?;
        let experts = points().filter(|(row, _)| row.experts.is_some());
        chart.draw_series(experts.map(|(_, at)| TriangleMarker::new(at, 7, colour.filled())))?;
        let y = 90 + 24 * number as i32;
        root.draw(&Rectangle::new([(930, y), (944, y + 14)], colour.filled()))?;
        root.draw(&Text::new((*scheme).to_owned(), (952, y - 1), text(15)))?;
    }
    if rows.iter().any(|row| row.experts.is_some()) {
        let y = 100 + 24 * schemes.len() as i32;
        root.draw(&Text::new("circle: dense", (930, y), text(15)))?;
        root.draw(&Text::new("triangle: experts", (930, y + 22), text(15)))?;
    }
    root.present()?;
    Ok(())
}
