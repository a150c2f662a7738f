//! Writes what the benches have printed into the report: tables, charts, the machine, and the plan's targets with what was
//! measured beside each. The words around them are written by hand and stay.
//!
//! `bench/run` runs the benches and then this.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use clap::Parser;

/// Brings bench/REPORT.md and its charts up to date.
#[derive(Debug, Parser)]
struct Cli {
    /// The folder with what the benches have printed: relay.md, turn.md and so on, as far as they were run
    results: PathBuf,
    /// The report
    #[arg(long, default_value = "bench/REPORT.md")]
    report: PathBuf,
    /// The folder of the charts
    #[arg(long, default_value = "bench/charts")]
    charts: PathBuf,
}

/// What each bench prints, and the section of the report that it belongs to.
const SECTIONS: [(&str, &str); 6] = [
    ("relay", "## Relay"),
    ("turn", "## TURN"),
    ("seed", "## Seed"),
    ("archive", "## The archive's word"),
    ("soak", "## Everything at once"),
    ("cluster", "## Relays side by side"),
];

/// A Markdown table.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    let mut report = std::fs::read_to_string(&cli.report).context("the report")?;
    for (name, section) in SECTIONS {
        let path = cli.results.join(format!("{name}.md"));
        if !path.exists() {
            println!("{name}: was not run, what stood there stays");
            continue;
        }
        let printed = std::fs::read_to_string(&path)?;
        report = with_tables(&report, section, &tables(&printed)).with_context(|| format!("{name}.md"))?;
    }
    report = with_part(&report, "machine", &machine(&cli.results)?)?;
    let all = by_section(&report);
    let targets = targets(&all);
    report = with_part(&report, "targets", &print(&targets))?;
    std::fs::create_dir_all(&cli.charts)?;
    for chart in CHARTS {
        std::fs::write(cli.charts.join(chart.file), chart.draw(&all)?)?;
    }
    write(&cli.report, &report)
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| path.display().to_string())
}

fn cells(line: &str) -> Option<Vec<String>> {
    let inner = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    Some(inner.split('|').map(|cell| cell.trim().to_owned()).collect())
}

/// The tables of a text; those with the same head are one.
fn tables(text: &str) -> Vec<Table> {
    let mut tables: Vec<Table> = Vec::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(head) = cells(line) else { continue };
        if lines.next_if(|next| next.starts_with("| ---")).is_none() {
            continue;
        }
        let mut rows: Vec<Vec<String>> = Vec::new();
        while let Some(mut row) = lines.peek().and_then(|next| cells(next)) {
            lines.next();
            // An empty first cell means the one above.
            if row.first().is_some_and(String::is_empty)
                && let Some(above) = rows.last().and_then(|above| above.first())
            {
                row[0].clone_from(above);
            }
            rows.push(row);
        }
        match tables.iter_mut().find(|table| table.head == head) {
            Some(table) => table.rows.append(&mut rows),
            None => tables.push(Table { head, rows }),
        }
    }
    tables
}

fn print(table: &Table) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&table.head) + "|" + &" --- |".repeat(table.head.len()) + "\n";
    table.rows.iter().for_each(|row| text.push_str(&line(row)));
    text
}

/// The report's text from a heading to the next of its rank.
fn section_of<'a>(report: &'a str, heading: &str) -> Option<(usize, &'a str)> {
    let start = report.find(&format!("\n{heading}\n"))? + 1;
    let end = report[start + 3..].find("\n## ").map_or(report.len(), |end| start + 3 + end + 1);
    Some((start, &report[start..end]))
}

/// The report with its tables of one section exchanged for new ones with the same head.
fn with_tables(report: &str, heading: &str, new: &[Table]) -> anyhow::Result<String> {
    let (start, section) = section_of(report, heading).with_context(|| format!("there is no section {heading:?}"))?;
    let mut text = section.to_owned();
    for table in new.iter().filter(|table| !table.rows.is_empty()) {
        let head = format!("| {} |\n", table.head.join(" | "));
        let Some(at) = text.find(&head) else { bail!("{heading} has no table {head}") };
        let length: usize =
            text[at..].split_inclusive('\n').take_while(|line| line.starts_with('|')).map(str::len).sum();
        text.replace_range(at..at + length, &print(table));
    }
    Ok(format!("{}{text}{}", &report[..start], &report[start + section.len()..]))
}

/// The report with what stands between two comments exchanged.
fn with_part(report: &str, name: &str, text: &str) -> anyhow::Result<String> {
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->"));
    let start = report.find(&begin).with_context(|| format!("there is no {begin}"))? + begin.len();
    let length = report[start..].find(&end).with_context(|| format!("there is no {end}"))?;
    Ok(format!("{}{text}{}", &report[..start], &report[start + length..]))
}

type Sections = BTreeMap<&'static str, Vec<Table>>;

fn by_section(report: &str) -> Sections {
    let of = |heading| section_of(report, heading).map_or(Vec::new(), |(_, text)| tables(text));
    SECTIONS.into_iter().map(|(name, heading)| (name, of(heading))).collect()
}

/// What the numbers were measured on.
fn machine(results: &Path) -> anyhow::Result<String> {
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        text.lines().find(|line| !line.trim().is_empty()).map(|line| line.trim().to_owned())
    };
    let field = |path: &str, name: &str| {
        let text = std::fs::read_to_string(path).ok()?;
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once([':', '='])?.1.trim().trim_matches('"').to_owned())
    };
    let cores = std::thread::available_parallelism()?;
    let memory = field("/proc/meminfo", "MemTotal").unwrap_or_default();
    let mut rows = vec![
        ("processor", format!("{cores} cores of {}", field("/proc/cpuinfo", "model name").unwrap_or_default())),
        ("memory", memory),
        ("system", field("/etc/os-release", "PRETTY_NAME").unwrap_or_default()),
        ("kernel", run("uname", &["-r"]).unwrap_or_default()),
        ("compiler", run("rustc", &["--version"]).unwrap_or_default()),
        ("Homeport", run("git", &["log", "-1", "--format=%h of %cs"]).unwrap_or_default()),
        ("coturn", run("dpkg-query", &["-W", "-f", "${Version}", "coturn"]).unwrap_or_else(|| "not there".into())),
    ];
    let ran: Vec<&str> =
        SECTIONS.into_iter().map(|(name, _)| name).filter(|name| results.join(format!("{name}.md")).exists()).collect();
    rows.push(("in this run", ran.join(", ")));
    let rows = rows.into_iter().map(|(what, is)| vec![what.to_owned(), is]).collect();
    Ok(print(&Table { head: vec!["machine".into(), "is".into()], rows }))
}

/// The first number in a cell.
fn number(cell: &str) -> Option<f64> {
    let start = cell.find(|character: char| character.is_ascii_digit())?;
    let digits = cell[start..].split(|character: char| !(character.is_ascii_digit() || character == '.')).next()?;
    digits.trim_end_matches('.').parse().ok()
}

/// The cell in a column, of the first row that begins with `labels`.
fn cell<'a>(all: &'a Sections, section: &str, column: &str, labels: &[&str]) -> Option<&'a str> {
    all.get(section)?.iter().find_map(|table| {
        let index = table.head.iter().position(|head| head == column)?;
        let row = table.rows.iter().find(|row| labels.iter().zip(*row).all(|(label, cell)| cell.starts_with(label)))?;
        row.get(index).map(String::as_str)
    })
}

/// The plan's targets, with what stands in the tables.
fn targets(all: &Sections) -> Table {
    let ratio = |section: &str, column: &str, shape: &str, other: &str| {
        let ours = number(cell(all, section, column, &[shape, "homeport"])?)?;
        let theirs = number(cell(all, section, column, &[shape, other])?)?;
        Some(format!("{:.2}", ours / theirs))
    };
    let relay = |column: &str, shape: &str| cell(all, "relay", column, &[shape, "homeport"]).map(str::to_owned);
    let turn = |shape: &str| ratio("turn", "µs CPU per packet", shape, "coturn");
    let of_two =
        |text: &str, first: Option<String>, second: Option<String>| Some(format!("{} {text}, {}", first?, second?));
    let seed = |label: &str| cell(all, "seed", "measured", &[label]).map(str::to_owned);
    let archive = |label: &str| cell(all, "archive", "measured", &[label]).map(str::to_owned);
    let rows: [(&str, &str, Option<String>); 18] = [
        (
            "relay, CPU per 100k deliveries, rooms of 10",
            "0.6 s (strfry 1.78)",
            relay("CPU s per 100k deliveries", "saturation").map(|cell| format!("{cell} s")),
        ),
        (
            "relay, p99 delivery at 500 connections",
            "1 ms (strfry 105)",
            relay("p99 ms", "latency").map(|it| it + " ms"),
        ),
        (
            "relay, memory per idle connection",
            "9 KiB (strfry 97)",
            relay("KiB each", "10000").map(|cell| format!("{cell} KiB")),
        ),
        (
            "relay, 1,000 peers of one room",
            "under one core",
            cell(all, "relay", "cores", &["1000", "within"]).map(|cell| format!("{cell} cores")),
        ),
        ("relay, 10,000 connections in rooms of 10", "p99 under 50 ms", relay("p99 ms", "crowd").map(|it| it + " ms")),
        (
            "relay, a calm room beside a flood",
            "p99 under 20 ms",
            cell(all, "relay", "p99 ms", &["20,000 events", "homeport"]).map(|cell| format!("{cell} ms")),
        ),
        ("TURN, CPU per packet, burst 8", "0.75 of coturn", turn("burst 8")),
        ("TURN, CPU per packet, burst 1", "0.8 of coturn", turn("burst 1")),
        (
            "TURN, CPU per packet, flood up, down",
            "0.6 of coturn",
            turn("flood up").zip(turn("flood down")).map(|(up, down)| format!("{up}, {down}")),
        ),
        (
            "TURN, loss at 200,000 packets/s up, down",
            "no more than coturn",
            of_two(
                "and coturn",
                cell(all, "turn", "lost", &["flood up", "homeport"])
                    .zip(cell(all, "turn", "lost", &["flood down", "homeport"]))
                    .map(|(up, down)| format!("{up}, {down}")),
                cell(all, "turn", "lost", &["flood down", "coturn"]).map(str::to_owned),
            ),
        ),
        (
            "TURN, memory per idle allocation",
            "6 KiB (coturn 20)",
            cell(all, "turn", "KiB each", &["idle", "homeport"]).map(|cell| format!("{cell} KiB")),
        ),
        (
            "seed, memory holding 20,000 small nodes: empty, written, restarted, served",
            "25 MB (GenosSRV 135)",
            seed("20000 nodes, memory"),
        ),
        ("seed, memory per idle link", "80 KB (webrtc 445)", seed("memory per idle link")),
        (
            "seed, fresh client to 20,000 nodes",
            "what the client needs, within 10%",
            seed("20000 nodes, a later client"),
        ),
        (
            "seed, 1,000,000 nodes in one room: empty, written, restarted, served",
            "under 200 MB",
            seed("1000000 nodes, memory"),
        ),
        ("seed, 1,000 idle rooms", "under 100 MB", seed("1000 idle rooms")),
        ("signatures checked", "thousands a second and core", archive("signatures checked")),
        ("a backup of 1,000,000 operations restored", "timed", archive("restored onto")),
    ];
    let rows = rows.into_iter().map(|(what, wanted, measured)| {
        vec![what.to_owned(), wanted.to_owned(), measured.unwrap_or_else(|| "not measured in this run".to_owned())]
    });
    Table { head: ["what", "wanted", "measured"].map(str::to_owned).to_vec(), rows: rows.collect() }
}

/// What a chart shows of a table: one bar for each row, named by its first cells.
struct Chart {
    file: &'static str,
    title: &'static str,
    section: &'static str,
    column: &'static str,
    /// Of how many cells a bar's name is made.
    labels: usize,
    /// Whether ten times as much is as far from one as a hundred times from ten.
    is_logarithmic: bool,
    /// Whether the rows follow one another in time: then a line is drawn.
    is_line: bool,
}

const CHARTS: [Chart; 7] = [
    Chart::bars(
        "relay-cpu.svg",
        "Relay: CPU seconds per 100,000 deliveries",
        "relay",
        "CPU s per 100k deliveries",
        true,
    ),
    Chart::bars("relay-p99.svg", "Relay: 99th percentile of delivery, ms", "relay", "p99 ms", true),
    Chart::bars("relay-memory.svg", "Relay: KiB per idle connection", "relay", "KiB each", false),
    Chart::bars("turn-cpu.svg", "TURN: µs of CPU per packet of 1000 B", "turn", "µs CPU per packet", false),
    Chart::bars("turn-stream.svg", "TURN over TCP and TLS: CPU seconds per GB", "turn", "CPU s per GB", false),
    Chart::bars("turn-memory.svg", "TURN: KiB per idle allocation", "turn", "KiB each", false),
    Chart {
        file: "soak-memory.svg",
        title: "Everything at once: memory in MiB, minute by minute",
        section: "soak",
        column: "MiB",
        labels: 1,
        is_logarithmic: false,
        is_line: true,
    },
];

const WIDTH: f64 = 760.0;
const BAR: f64 = 20.0;
const NAMES: f64 = 330.0;

impl Chart {
    const fn bars(
        file: &'static str,
        title: &'static str,
        section: &'static str,
        column: &'static str,
        is_logarithmic: bool,
    ) -> Self {
        Self { file, title, section, column, labels: 2, is_logarithmic, is_line: false }
    }

    fn points(&self, all: &Sections) -> anyhow::Result<Vec<(String, f64)>> {
        let tables = all.get(self.section).context("no such section")?;
        let table = tables
            .iter()
            .find(|table| table.head.iter().any(|head| head == self.column))
            .with_context(|| format!("{} has no column {:?}", self.section, self.column))?;
        let index = table.head.iter().position(|head| head == self.column).context("no such column")?;
        let point = |row: &Vec<String>| {
            // What stands behind a colon says how; the table does too.
            let words = |cell: &String| cell.split(':').next().unwrap_or_default().to_owned();
            let name = row.iter().take(self.labels).map(words).collect::<Vec<_>>().join(", ");
            Some((name, number(row.get(index)?)?))
        };
        Ok(table.rows.iter().filter_map(point).collect())
    }

    fn draw(&self, all: &Sections) -> anyhow::Result<String> {
        let points = self.points(all)?;
        let most = points.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
        let body = if self.is_line { line(&points, most) } else { self.draw_bars(&points, most) };
        let height = if self.is_line { 300.0 } else { BAR.mul_add(1.3 * points.len() as f64, 60.0) };
        Ok(format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0}" font-family="sans-serif" font-size="13" role="img" aria-label="{title}">
<style>text {{ fill: #333 }} .ours {{ fill: #2a7de1; stroke: #2a7de1 }} .theirs {{ fill: #999 }} .axis {{ stroke: #bbb }} @media (prefers-color-scheme: dark) {{ text {{ fill: #ddd }} .axis {{ stroke: #555 }} }}</style>
<text x="10" y="24" font-size="16">{title}</text>
{body}</svg>
"##,
            title = escaped(self.title),
        ))
    }

    fn draw_bars(&self, points: &[(String, f64)], most: f64) -> String {
        let least = points.iter().map(|(_, value)| *value).filter(|value| *value > 0.0).fold(most, f64::min);
        let room = WIDTH - NAMES - 90.0;
        let length = |value: f64| {
            if !self.is_logarithmic || most <= least {
                return room * value / most;
            }
            // The least has a tenth of the width.
            let share = (value.max(least) / least).ln() / (most / least).ln();
            room * share.mul_add(0.9, 0.1)
        };
        let mut body = String::new();
        for (index, (name, value)) in points.iter().enumerate() {
            let y = BAR.mul_add(1.3 * index as f64, 44.0);
            let class = if name.contains("homeport") { "ours" } else { "theirs" };
            let _ = writeln!(
                body,
                r#"<text x="{:.0}" y="{:.0}" text-anchor="end" font-size="12">{}</text><rect class="{class}" x="{NAMES}" y="{y:.0}" width="{:.1}" height="{BAR}"/><text x="{:.0}" y="{:.0}">{value}</text>"#,
                NAMES - 8.0,
                y + 14.0,
                escaped(name),
                length(*value),
                NAMES + length(*value) + 6.0,
                y + 14.0,
            );
        }
        if self.is_logarithmic {
            let y = BAR.mul_add(1.3 * points.len() as f64, 54.0);
            let _ = writeln!(body, r#"<text x="{NAMES}" y="{y:.0}" font-size="11">logarithmic</text>"#);
        }
        body
    }
}

/// A line over time from nothing to the most.
fn line(points: &[(String, f64)], most: f64) -> String {
    let (left, top, width, height) = (60.0, 44.0, WIDTH - 90.0, 210.0);
    let steps = points.len().saturating_sub(1).max(1) as f64;
    let at = |index: usize, value: f64| (left + width * index as f64 / steps, top + height * (1.0 - value / most));
    let path: Vec<String> = points
        .iter()
        .enumerate()
        .map(|(index, (_, value))| {
            let (x, y) = at(index, *value);
            format!("{x:.1},{y:.1}")
        })
        .collect();
    let mut body = format!(
        r#"<line class="axis" x1="{left}" y1="{bottom}" x2="{right}" y2="{bottom}"/><line class="axis" x1="{left}" y1="{top}" x2="{left}" y2="{bottom}"/>
<text x="{x}" y="{middle}" text-anchor="end">{most:.0}</text><text x="{x}" y="{bottom}" text-anchor="end">0</text>
<polyline class="ours" style="fill: none" stroke-width="2" points="{}"/>
"#,
        path.join(" "),
        bottom = top + height,
        right = left + width,
        x = left - 6.0,
        middle = top + 5.0,
    );
    for (index, (name, _)) in points.iter().enumerate().step_by(points.len().div_ceil(12).max(1)) {
        let (x, _) = at(index, 0.0);
        let _ =
            writeln!(body, r#"<text x="{x:.0}" y="275" text-anchor="middle" font-size="11">{}</text>"#, escaped(name));
    }
    body
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "# R\n\n<!-- machine -->\nold\n<!-- /machine -->\n\n## Relay\n\nWords.\n\n| shape | p99 ms |\n| --- | --- |\n| a | 1 |\n\nMore words.\n\n## TURN\n\n| shape | p99 ms |\n| --- | --- |\n| b | 2 |\n";

    #[test]
    fn a_table_is_exchanged_in_its_section_and_the_words_stay() {
        let new =
            tables("| shape | p99 ms |\n| --- | --- |\n| a | 3 |\n\n| shape | p99 ms |\n| --- | --- |\n| | 4 |\n");
        assert_eq!(new.len(), 1, "two with one head are one");
        let report = with_tables(REPORT, "## Relay", &new).unwrap();
        assert!(report.contains("Words.\n\n| shape | p99 ms |\n| --- | --- |\n| a | 3 |\n|  | 4 |\n\nMore words."));
        assert!(report.contains("| b | 2 |"));
        let other = tables("| another | p99 ms |\n| --- | --- |\n| a | 3 |\n");
        assert!(with_tables(REPORT, "## Relay", &other).is_err(), "what has no place is not lost in silence");
        assert!(with_part(REPORT, "machine", "new\n").unwrap().starts_with("# R\n\n<!-- machine -->\nnew\n<!--"));
    }

    #[test]
    fn a_cell_is_found_by_its_row_and_begins_with_a_number_or_not() {
        let all = Sections::from([(
            "relay",
            tables("| shape | who | p99 |\n| --- | --- | --- |\n| a: 5 | us | 0.25 (x) |\n| | them | none |\n"),
        )]);
        assert_eq!(cell(&all, "relay", "p99", &["a", "us"]).and_then(number), Some(0.25));
        assert_eq!(cell(&all, "relay", "p99", &["a", "them"]).and_then(number), None);
        assert_eq!(cell(&all, "relay", "p99", &["b"]), None);
    }
}
