// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory saved, and faults, over time.

use std::{fs::OpenOptions, path::Path};

use plotters::prelude::*;

use super::{error::Error, progress::Point};

/// Whether the plot could be written; found out before the run, not after it.
pub(crate) fn can_write(path: &Path) -> Result<(), Error> {
    let opened = OpenOptions::new().create(true).append(true).open(path);
    opened.map(drop).map_err(|source| Error::PlotPath { path: path.into(), source })
}

/// Draws the points of a run: MiB saved on the left, faults a second on the right.
pub(crate) fn draw(path: &Path, points: &[Point]) -> Result<(), Error> {
    try_draw(path, points).map_err(|error| Error::Plot { path: path.into(), cause: error.to_string() })
}

fn try_draw(path: &Path, points: &[Point]) -> Result<(), Box<dyn std::error::Error>> {
    let saved: Vec<_> = points.iter().map(|p| (p.at.as_secs_f64(), p.saved as f64 / f64::from(1 << 20))).collect();
    let rates: Vec<_> = points
        .windows(2)
        .map(|pair| {
            let seconds = (pair[1].at - pair[0].at).as_secs_f64().max(1e-3);
            (pair[1].at.as_secs_f64(), pair[1].faults.saturating_sub(pair[0].faults) as f64 / seconds)
        })
        .collect();
    let most = |series: &[(f64, f64)]| series.iter().map(|(_, y)| *y).fold(1.0, f64::max) * 1.05;
    let end = points.last().map_or(1.0, |p| p.at.as_secs_f64()).max(0.1);

    let area = SVGBackend::new(path, (900, 480)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("dedup: memory saved, and faults", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .right_y_label_area_size(72)
        .build_cartesian_2d(0.0..end, 0.0..most(&saved))?
        .set_secondary_coord(0.0..end, 0.0..most(&rates));
    chart
        .configure_mesh()
        .x_desc("seconds")
        .y_desc("MiB saved")
        .y_label_formatter(&|y| format!("{y:.0}"))
        .light_line_style(WHITE)
        .draw()?;
    chart.configure_secondary_axes().y_desc("faults a second").y_label_formatter(&|y| format!("{y:.0}")).draw()?;
    let line = |color: RGBColor| move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color);
    chart.draw_series(LineSeries::new(saved, BLUE.stroke_width(2)))?.label("MiB saved").legend(line(BLUE));
    chart
        .draw_secondary_series(LineSeries::new(rates, RED.stroke_width(1)))?
        .label("faults a second")
        .legend(line(RED));
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_plot_is_an_svg_file_even_of_nothing() {
        let path = std::env::temp_dir().join(format!("dedup-plot-{}.svg", std::process::id()));
        can_write(&path).unwrap();
        let point = |s| Point { at: Duration::from_secs(s), merged: s, saved: s << 20, faults: s * 9, damage: 0 };
        for points in [vec![], vec![point(0)], vec![point(0), point(1), point(2)]] {
            draw(&path, &points).unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
        }
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(can_write(Path::new("/nowhere/plot.svg")), Err(Error::PlotPath { .. })));
    }
}
