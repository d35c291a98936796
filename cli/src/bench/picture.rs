//! The picture: for each scenario the share of the direct path's rate that the mesh keeps, with Istio's as a mark.

use std::fmt::Write;

use anyhow::Result;

use super::results::{Istio, Record, istio};

const ROW: f64 = 26.0;
const LEFT: f64 = 230.0;
const WIDTH: f64 = 420.0;

/// Draws rates (more is better); costs are in the table.
pub fn draw(records: &[Record]) -> Result<String> {
    let rates: Vec<&Record> =
        records.iter().filter(|r| matches!(r.metric, "gbps" | "rps" | "cps") && r.ratio.is_some()).collect();
    let most = rates.iter().filter_map(|r| r.ratio).fold(1.0, f64::max);
    let height = ROW * rates.len() as f64 + 70.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{:.0}\" height=\"{height:.0}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"20\" font-weight=\"bold\">Rate through the mesh, as a share of the direct path's</text>\n",
        LEFT + WIDTH + 90.0
    );
    for (i, record) in rates.iter().enumerate() {
        let y = 36.0 + ROW * i as f64;
        let ratio = record.ratio.unwrap_or_default();
        let fill = if record.path.starts_with("across") { "#2b6cb0" } else { "#63b3ed" };
        writeln!(svg, "<text x=\"10\" y=\"{:.0}\">{}, {}</text>", y + 15.0, record.scenario, record.path)?;
        writeln!(
            svg,
            "<rect x=\"{LEFT}\" y=\"{y:.0}\" width=\"{:.1}\" height=\"{:.0}\" fill=\"{fill}\"/>",
            WIDTH * ratio / most,
            ROW - 8.0
        )?;
        writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.0}\">{ratio:.2}</text>",
            LEFT + WIDTH * ratio / most + 6.0,
            y + 15.0
        )?;
        if let Some(Istio::Ratio(theirs)) = istio(record.scenario, record.path, record.metric) {
            let x = LEFT + WIDTH * theirs / most;
            writeln!(
                svg,
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.0}\" y2=\"{:.0}\" stroke=\"#c53030\" stroke-width=\"3\"/>",
                y - 2.0,
                y + ROW - 6.0
            )?;
        }
    }
    writeln!(
        svg,
        "<text x=\"10\" y=\"{:.0}\" fill=\"#c53030\">red: Istio's ztunnel, from another run on a like machine</text>\n</svg>",
        height - 12.0
    )?;
    Ok(svg)
}
