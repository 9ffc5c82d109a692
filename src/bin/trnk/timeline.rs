//! A modelled run as a picture: a lane for each engine, a colour for each class of instructions.
#![forbid(unsafe_code)]

use crate::failure::Failure;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use trn_kernels::trainium::cost::Cost;
use trn_kernels::trainium::emulator::{Engine, Instruction, Program};

/// Above this many instructions neighbours are drawn as one.
const SINGLY: usize = 20_000;
/// Rectangles of a picture at most: about 100 bytes each.
const RECTANGLES: usize = 8_000;

const WIDTH: u32 = 1600;
const LEFT: u32 = 170;
const RIGHT: u32 = 30;
const TOP: i32 = 92;
const ROW: i32 = 26;
const GAP: i32 = 12;
const AXIS: u32 = 50;
const FONT: &str = "sans-serif";

/// What an instruction is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Matmul,
    Transpose,
    Load,
    Store,
    Quantize,
    Copy,
    Activation,
    Arithmetic,
}

impl Class {
    const ALL: [Class; 8] = [
        Class::Matmul,
        Class::Transpose,
        Class::Load,
        Class::Store,
        Class::Quantize,
        Class::Copy,
        Class::Activation,
        Class::Arithmetic,
    ];

    fn of(program: &Program, instruction: &Instruction) -> Class {
        let in_hbm = |written: bool| {
            let mut operands = instruction.operands().iter().filter(|o| o.written == written);
            operands.any(|o| !program.tensors()[o.access.tensor].buffer().on_chip())
        };
        match (instruction.engine(), instruction.name()) {
            (Engine::Tensor, name) if name.contains("matmul") => Class::Matmul,
            (Engine::Tensor, _) => Class::Transpose,
            (Engine::Dma, _) if in_hbm(true) => Class::Store,
            (Engine::Dma, _) if in_hbm(false) => Class::Load,
            (Engine::Dma, _) => Class::Copy,
            (_, "quantize_mx") => Class::Quantize,
            (_, name) if name.contains("transpose") => Class::Transpose,
            (_, name) if name.contains("copy") || name == "memset" => Class::Copy,
            (_, name) if name.starts_with("activation") || name == "exponential" => Class::Activation,
            _ => Class::Arithmetic,
        }
    }

    fn label(self) -> &'static str {
        match self {
            Class::Matmul => "matmul",
            Class::Transpose => "transpose",
            Class::Load => "load from HBM",
            Class::Store => "store to HBM",
            Class::Quantize => "quantize",
            Class::Copy => "copy, memset",
            Class::Activation => "activation",
            Class::Arithmetic => "other arithmetic",
        }
    }

    /// Okabe and Ito's colours, which colour-blind readers tell apart.
    fn colour(self) -> RGBColor {
        match self {
            Class::Matmul => RGBColor(0, 114, 178),
            Class::Transpose => RGBColor(86, 180, 233),
            Class::Load => RGBColor(0, 158, 115),
            Class::Store => RGBColor(213, 94, 0),
            Class::Quantize => RGBColor(204, 121, 167),
            Class::Copy => RGBColor(230, 159, 0),
            Class::Activation => RGBColor(240, 228, 66),
            Class::Arithmetic => RGBColor(120, 120, 120),
        }
    }
}

/// A rectangle: seconds from and to, and what it shows most of.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Bar {
    from: f64,
    to: f64,
    class: Class,
    /// Seconds of the class shown.
    shown: f64,
}

/// A lane: its name and its rows of bars, each ascending and apart.
struct Lane {
    name: String,
    rows: Vec<Vec<Bar>>,
}

/// The picture of a program's modelled run.
pub(crate) fn svg(program: &Program, chip: &str, cost: &Cost) -> Result<String, Failure> {
    let lanes = lanes(program, cost);
    let title = format!("{} {} on one core of {chip}", program.kernel(), program.example());
    let mut out = String::new();
    draw(&mut out, &title, cost.seconds, &lanes).map_err(|e| Failure::refused(format!("timeline: {e}")))?;
    Ok(out)
}

fn lanes(program: &Program, cost: &Cost) -> Vec<Lane> {
    let bar = |i: usize| {
        let span = &cost.spans[i];
        let class = Class::of(program, &program.instructions()[i]);
        Bar { from: span.start, to: span.end, class, shown: span.end - span.start }
    };
    let mut lanes = vec![Lane { name: "critical path".into(), rows: rows(cost.critical_path().into_iter().map(bar)) }];
    for engine in Engine::ALL {
        let of_engine = (0..cost.spans.len()).filter(|&i| cost.spans[i].engine == engine);
        let rows = rows(of_engine.map(bar));
        if !rows.is_empty() {
            lanes.push(Lane { name: format!("{} {:.1} %", engine.name(), 100.0 * cost.share(engine)), rows });
        }
    }
    let count = |lanes: &[Lane]| lanes.iter().flat_map(|l| &l.rows).map(Vec::len).sum::<usize>();
    // From a quarter of a pixel on, so that merging shows only where nothing could be seen, then as coarse as it must be.
    let mut gap = cost.seconds / f64::from(WIDTH) / 4.0;
    let mut merging = program.instructions().len() > SINGLY;
    while merging || count(&lanes) > RECTANGLES {
        lanes.iter_mut().flat_map(|l| &mut l.rows).for_each(|row| *row = merged(row, gap));
        (gap, merging) = (2.0 * gap, false);
        if gap > cost.seconds {
            break; // every row is one bar
        }
    }
    lanes
}

/// Bars in as few rows as have no two at once: DMA transfers share the bandwidth.
fn rows(bars: impl Iterator<Item = Bar>) -> Vec<Vec<Bar>> {
    let mut bars: Vec<Bar> = bars.filter(|b| b.to > b.from).collect();
    bars.sort_by(|a, b| a.from.total_cmp(&b.from));
    let mut rows: Vec<Vec<Bar>> = vec![];
    for bar in bars {
        match rows.iter_mut().find(|row| row.last().is_none_or(|last| last.to <= bar.from + 1e-12)) {
            Some(row) => row.push(bar),
            None => rows.push(vec![bar]),
        }
    }
    rows
}

/// Neighbours at most `gap` apart as one: those of a class, and those too short to be told apart.
fn merged(row: &[Bar], gap: f64) -> Vec<Bar> {
    let mut out: Vec<Bar> = vec![];
    for &bar in row {
        let short = |b: &Bar| b.to - b.from <= gap;
        match out.last_mut() {
            Some(last) if bar.from - last.to <= gap && (last.class == bar.class || (short(last) && short(&bar))) => {
                last.to = bar.to;
                if last.class == bar.class {
                    last.shown += bar.shown;
                } else if bar.shown > last.shown {
                    (last.class, last.shown) = (bar.class, bar.shown);
                }
            }
            _ => out.push(bar),
        }
    }
    out
}

type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;

fn draw(out: &mut String, title: &str, seconds: f64, lanes: &[Lane]) -> Drawn {
    let height = |lane: &Lane| lane.rows.len().max(1) as i32 * ROW + GAP;
    let body: i32 = lanes.iter().map(height).sum();
    let size = (WIDTH, (TOP + body) as u32 + AXIS);
    let root = SVGBackend::with_string(out, size).into_drawing_area();
    root.fill(&WHITE)?;
    let text = |size: i32| (FONT, size).into_font().color(&BLACK);
    root.draw(&Text::new(title.to_owned(), (20, 10), text(22)))?;
    let what = format!("{:.2} us, a model from documented constants, not a measurement", 1e6 * seconds);
    root.draw(&Text::new(what, (20, 38), text(16)))?;
    legend(&root, lanes)?;

    let micros = 1e6 * seconds;
    let mut chart = ChartBuilder::on(&root)
        .margin_top(TOP)
        .margin_right(RIGHT)
        .x_label_area_size(AXIS)
        .y_label_area_size(LEFT)
        .build_cartesian_2d(0.0..micros.max(f64::MIN_POSITIVE), 0..body)?;
    chart.configure_mesh().disable_y_mesh().disable_y_axis().x_labels(16).x_desc("us").draw()?;

    let (x, _) = chart.plotting_area().get_pixel_range();
    let at = |time: f64| x.start + ((time / seconds) * f64::from(x.end - x.start)).round() as i32;
    let name = text(15).pos(Pos::new(HPos::Right, VPos::Center));
    let mut top = TOP;
    for lane in lanes {
        let middle = top + (height(lane) - GAP) / 2;
        root.draw(&Text::new(lane.name.clone(), (x.start - 10, middle), name.clone()))?;
        for (number, row) in lane.rows.iter().enumerate() {
            let above = top + number as i32 * ROW;
            for bar in row {
                // A bar is seen, however short it is.
                let (from, to) = (at(bar.from), at(bar.to).max(at(bar.from) + 1));
                let corners = [(from, above + 2), (to, above + ROW - 2)];
                root.draw(&Rectangle::new(corners, bar.class.colour().filled()))?;
            }
        }
        top += height(lane);
    }
    root.present()
}

/// The classes that occur.
fn legend(root: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>, lanes: &[Lane]) -> Drawn {
    let mut left = LEFT as i32;
    for class in Class::ALL {
        if lanes.iter().flat_map(|l| l.rows.iter().flatten()).any(|bar| bar.class == class) {
            root.draw(&Rectangle::new([(left, 66), (left + 14, 80)], class.colour().filled()))?;
            let style = (FONT, 15).into_font().color(&BLACK);
            root.draw(&Text::new(class.label(), (left + 20, 65), style))?;
            left += 40 + 8 * class.label().len() as i32;
        }
    }
    Ok(())
}
