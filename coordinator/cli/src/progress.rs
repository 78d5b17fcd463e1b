//! What is shown while something takes time: a spinner on a terminal, plain lines elsewhere. On standard error only.

use indicatif::{ProgressBar, ProgressStyle};
use std::{cell::RefCell, io::IsTerminal as _, io::Write as _, time::Duration};
use tokio::time::Instant;

/// Progress of one command. The spinner is gone when it is dropped.
#[derive(Debug)]
pub struct Progress {
    bar: RefCell<Option<ProgressBar>>,
    began: Instant,
    last: RefCell<String>,
}

impl Progress {
    /// Begins; the elapsed time counts from here.
    #[must_use]
    pub fn begin() -> Self {
        let bar = std::io::stderr().is_terminal().then(spinner);
        Self { bar: RefCell::new(bar), began: Instant::now(), last: RefCell::default() }
    }

    /// Begins again after [`Progress::end`]; the elapsed time goes on.
    pub fn resume(&self, what: &str) {
        if std::io::stderr().is_terminal() {
            self.end();
            *self.bar.borrow_mut() = Some(spinner().with_elapsed(self.began.elapsed()));
        }
        self.doing(what);
    }

    /// What is being waited for now. Said once, however often it is repeated.
    pub fn doing(&self, what: &str) {
        if *self.last.borrow() == what {
            return;
        }
        what.clone_into(&mut self.last.borrow_mut());
        match self.bar.borrow().as_ref() {
            Some(bar) => bar.set_message(crate::output::printable(what)),
            None => self.print(what),
        }
    }

    /// A step that is complete; stays on the screen.
    pub fn done(&self, what: &str) {
        self.last.borrow_mut().clear();
        self.print(what);
    }

    /// Ends the spinner, so that other output can follow.
    pub fn end(&self) {
        if let Some(bar) = self.bar.borrow_mut().take() {
            bar.finish_and_clear();
        }
    }

    fn print(&self, what: &str) {
        let line = format!("{:>6.1}s  {}", self.began.elapsed().as_secs_f64(), crate::output::printable(what));
        match self.bar.borrow().as_ref() {
            Some(bar) if !bar.is_finished() => bar.println(line),
            _ => {
                // Nobody reads standard error: then nobody misses the progress.
                let _ = writeln!(std::io::stderr().lock(), "{line}");
            }
        }
    }
}

fn spinner() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    // The template is a constant; should it be wrong, indicatif's own is as good.
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed:>4}  {wide_msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}
