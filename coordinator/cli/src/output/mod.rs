//! What is printed, and how: tables and colours for people, JSON for programs.
//!
//! Owns standard output. Results go there and nothing else does: progress, notices and errors go to standard error,
//! so that `--output json | jq` always reads whole documents.

pub mod tables;

use crate::failure::Failure;
use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table, presets};
use std::io::{IsTerminal as _, Write as _};

/// How often it is looked whether there is still a reader.
const READER_INTERVAL: std::time::Duration = std::time::Duration::from_millis(250);

/// Form of what is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// Tables and sentences for people.
    #[default]
    Table,
    /// One JSON document, or JSON lines for streams.
    Json,
}

/// Where and how results are printed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Output {
    format: Format,
    colour: bool,
    terminal: bool,
    verbose: bool,
}

/// What a cell means, which decides its colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// No colour.
    Plain,
    /// As it should be.
    Good,
    /// Under way.
    Busy,
    /// Somebody has to look.
    Bad,
}

impl Output {
    /// By the wish of the caller and what standard output is. Colour only on a terminal, and not with `NO_COLOR`.
    #[must_use]
    pub fn new(format: Format, verbose: bool) -> Self {
        let terminal = std::io::stdout().is_terminal();
        let refused = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        Self { format, colour: terminal && !refused, terminal, verbose }
    }

    /// Whether programs read the output.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Whether standard output is a terminal.
    #[must_use]
    pub fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// A line for people.
    pub fn line(&self, text: &str) -> Result<(), Failure> {
        self.raw(&format!("{text}\n"))
    }

    /// Text as it is, at once.
    pub fn raw(&self, text: &str) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    }

    /// One JSON document, indented.
    pub fn document(&self, value: &serde_json::Value) -> Result<(), Failure> {
        self.line(&serde_json::to_string_pretty(value).unwrap_or_else(|_| value.to_string()))
    }

    /// One line of JSON lines.
    pub fn json_line(&self, value: &serde_json::Value) -> Result<(), Failure> {
        self.line(&value.to_string())
    }

    /// A table; `empty` is said (to people) when there are no rows.
    pub fn table(&self, header: &[&str], rows: Vec<Vec<(String, Tone)>>, empty: &str) -> Result<(), Failure> {
        if rows.is_empty() {
            self.notice(empty);
            return Ok(());
        }
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        // Wrapped for people; a program that cuts columns gets one line for each row.
        table.set_content_arrangement(if self.terminal {
            ContentArrangement::Dynamic
        } else {
            ContentArrangement::Disabled
        });
        let width = table.width();
        table.force_no_tty();
        if let (true, Some(width)) = (self.terminal, width) {
            table.set_width(width);
        }
        if self.colour {
            table.enforce_styling();
        }
        table.set_header(header.iter().map(|h| Cell::new(h).add_attribute(Attribute::Bold)).collect::<Vec<_>>());
        for row in rows {
            table.add_row(row.into_iter().map(|(text, tone)| cell(&text, tone)).collect::<Vec<_>>());
        }
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        let lines: Vec<String> = table.lines().map(|l| l.trim_end().to_owned()).collect();
        self.line(&lines.join("\n"))
    }

    /// Text in the colour of its tone, where there are colours.
    #[must_use]
    pub fn paint(&self, text: &str, tone: Tone) -> String {
        use owo_colors::OwoColorize as _;
        match tone {
            Tone::Good if self.colour => text.green().to_string(),
            Tone::Busy if self.colour => text.yellow().to_string(),
            Tone::Bad if self.colour => text.red().to_string(),
            _ => text.to_owned(),
        }
    }

    /// A remark for people that is no result.
    pub fn notice(&self, text: &str) {
        // Nobody reads standard error: then nobody misses the remark.
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    }

    /// A remark that is only wanted with `--verbose`.
    pub fn verbose(&self, text: &str) {
        if self.verbose {
            self.notice(text);
        }
    }
}

/// Waits until nobody can read standard output any more: a stream that has nothing to say for now would not find out by
/// writing. Never returns where that can't happen (a file, a terminal).
pub async fn reader_left() {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd as _;
    loop {
        {
            let stdout = std::io::stdout();
            // A pipe without readers is in error, whatever is asked for.
            let mut state = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
            let polled = poll(&mut state, PollTimeout::ZERO);
            if polled.is_ok() && state[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR)) {
                return;
            }
        }
        tokio::time::sleep(READER_INTERVAL).await;
    }
}

fn cell(text: &str, tone: Tone) -> Cell {
    let cell = Cell::new(printable(text));
    match tone {
        Tone::Plain => cell,
        Tone::Good => cell.fg(Color::Green),
        Tone::Busy => cell.fg(Color::Yellow),
        Tone::Bad => cell.fg(Color::Red),
    }
}

/// Without control characters, which could steer a terminal: what is shown was written by others.
#[must_use]
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_others_can_not_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[31mb\u{9b}c\n"), "a\u{fffd}[31mb\u{fffd}c\u{fffd}");
    }
}
