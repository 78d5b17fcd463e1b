//! The file that says until when a server may live whose deployment says `on_lease_lost = "stop"`, and the shim's watch
//! over it.
//!
//! The agent writes it ([`write`]) whenever the lease under which the server was claimed is renewed; the shim reads it when
//! the time is over that it knows of ([`Watch`]), and ends the server unless there is more by then. So the server is over
//! before the lease is, whatever becomes of agent, coordinators and network. All times are nanoseconds on CLOCK_BOOTTIME:
//! what passed while the host was asleep counts.
//!
//! One line of text of a fixed length, written over in place: that needs no room on a full disk, and a reader that meets a
//! write half done sees it by the checksum. It is not synced, since nothing that it tells of outlives the host. Read and
//! written by calls and not mapped into memory: a mapped file that somebody cuts off ends whoever looks at it.

use crate::clock;
use nix::{
    poll::{PollTimeout, poll},
    sys::{
        time::TimeSpec,
        timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
    },
};
use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
    time::Duration,
};

/// How often a file is read again that can't be read, or not as it was written, and with what pause in milliseconds.
const READ_ATTEMPTS: u32 = 5;
const READ_PAUSE_MS: u16 = 5;

/// Length of the file, in bytes: four numbers of 20 digits, a checksum of 8, a space after each number, a line end.
const BYTES: usize = 4 * 21 + 8 + 1;

/// What happens when, should the lease not be renewed any more. In nanoseconds on CLOCK_BOOTTIME.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// It gets no new requests from then on: the agent's business.
    pub drain_ns: u64,
    /// It is asked to end (SIGTERM).
    pub term_ns: u64,
    /// It is ended, with all that it has started (SIGKILL).
    pub kill_ns: u64,
    /// The lease ends.
    pub until_ns: u64,
}

impl Times {
    fn line(self) -> String {
        let numbers = format!("{:020} {:020} {:020} {:020}", self.drain_ns, self.term_ns, self.kill_ns, self.until_ns);
        let sum = crc32fast::hash(numbers.as_bytes());
        format!("{numbers} {sum:08x}\n")
    }

    fn parse(line: &str) -> Option<Self> {
        let (numbers, sum) = line.strip_suffix('\n')?.rsplit_once(' ')?;
        if sum != format!("{:08x}", crc32fast::hash(numbers.as_bytes())) {
            return None;
        }
        let mut numbers = numbers.split(' ').map(|number| number.parse().ok());
        let mut next = || numbers.next().flatten();
        Some(Self { drain_ns: next()?, term_ns: next()?, kill_ns: next()?, until_ns: next()? })
    }
}

/// Reads the file.
///
/// # Errors
/// It is absent, or can't be read; `InvalidData` when it is damaged.
pub fn read(path: &Path) -> io::Result<Times> {
    let mut bytes = Vec::with_capacity(BYTES);
    File::open(path)?.take(BYTES as u64 + 1).read_to_end(&mut bytes)?;
    let damaged = || io::Error::new(io::ErrorKind::InvalidData, format!("{} is damaged", path.display()));
    std::str::from_utf8(&bytes).ok().and_then(Times::parse).ok_or_else(damaged)
}

/// Writes the file in place; makes it when it is absent.
///
/// # Errors
/// It can't be written.
pub fn write(path: &Path, times: Times) -> io::Result<()> {
    let line = times.line();
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    file.write_all_at(line.as_bytes(), 0)?;
    // Whatever else stands there was not written by this.
    if file.metadata()?.len() == line.len() as u64 { Ok(()) } else { file.set_len(line.len() as u64) }
}

/// What a shim does next about its server's lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing yet.
    Wait,
    /// Ask it to end.
    Terminate,
    /// End it, and all that it has started.
    Kill,
}

/// A shim's watch over the lease of its server.
#[derive(Debug)]
pub struct Watch {
    file: PathBuf,
    /// As last read: what counts when the file can't be read.
    times: Times,
    timer: TimerFd,
    /// It was asked to end, and there is no way back.
    ending: bool,
}

impl Watch {
    /// Begins to watch.
    ///
    /// # Errors
    /// The file can't be read, or the kernel gives no timer.
    pub fn begin(file: &Path) -> io::Result<Self> {
        let times = read(file)?;
        let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC)?;
        let watch = Self { file: file.to_owned(), times, timer, ending: false };
        watch.arm()?;
        Ok(watch)
    }

    /// Whether something may be started under this lease: there is time until it would have to end.
    #[must_use]
    pub fn allows_start(&self) -> bool {
        clock::boottime_ns() < self.times.term_ns
    }

    /// Whether it was the lease that ended the server.
    #[must_use]
    pub fn has_ended_it(&self) -> bool {
        self.ending
    }

    /// The timer has gone off, or something else has woken the shim: what to do now.
    pub fn look(&mut self) -> Step {
        let now_ns = clock::boottime_ns();
        if !self.ending && now_ns >= self.times.term_ns {
            self.read_again();
        }
        let step = due(self.times, now_ns, self.ending);
        self.ending |= step != Step::Wait;
        // A timer that can't be set is made up for by the sweep, which comes by in any case.
        let _ = self.arm();
        step
    }

    /// A write that is under way is over in a moment. Where the file can't be read, the lease counts as not renewed since.
    fn read_again(&mut self) {
        for _ in 0..READ_ATTEMPTS {
            match read(&self.file) {
                Ok(times) => {
                    self.times = times;
                    return;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => return,
                Err(_) => drop(poll(&mut [], PollTimeout::from(READ_PAUSE_MS))),
            }
        }
    }

    fn arm(&self) -> io::Result<()> {
        // A killed server that does not end waits for the kernel: it is killed again then, at the next sweep.
        let at_ns = match (self.ending, self.times) {
            (false, times) => times.term_ns,
            (true, times) if clock::boottime_ns() < times.kill_ns => times.kill_ns,
            (true, _) => return Ok(self.timer.unset()?),
        };
        // 0 would switch it off.
        let at = TimeSpec::from_duration(Duration::from_nanos(at_ns.max(1)));
        Ok(self.timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?)
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

/// PURE. What is due at `now_ns`. A server that was asked to end is not spared any more.
fn due(times: Times, now_ns: u64, ending: bool) -> Step {
    match now_ns {
        now if now >= times.kill_ns && (ending || now >= times.term_ns) => Step::Kill,
        now if now >= times.term_ns && !ending => Step::Terminate,
        _ => Step::Wait,
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "damages a file on purpose")]
mod tests {
    use super::*;

    const TIMES: Times = Times { drain_ns: 1, term_ns: 20, kill_ns: 300, until_ns: u64::MAX };

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed_and_the_next_write_heals_it() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("lease");
        assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::NotFound);
        write(&path, TIMES).unwrap();
        let good = std::fs::read(&path).unwrap();
        assert_eq!((good.len(), read(&path).unwrap()), (BYTES, TIMES));
        let mut bad: Vec<Vec<u8>> = (0..good.len()).map(|length| good[..length].to_vec()).collect();
        bad.push([good.as_slice(), b"x"].concat());
        for bit in 0..good.len() * 8 {
            let mut flipped = good.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            bad.push(flipped);
        }
        for bytes in bad {
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(read(&path).unwrap_err().kind(), io::ErrorKind::InvalidData, "{bytes:?}");
            write(&path, TIMES).unwrap();
            assert_eq!(read(&path).unwrap(), TIMES);
        }
    }

    #[test]
    fn it_is_asked_first_and_ended_when_that_does_not_help() {
        let at = |now, ending| due(TIMES, now, ending);
        assert_eq!([at(0, false), at(19, false), at(20, false), at(299, false)], {
            [Step::Wait, Step::Wait, Step::Terminate, Step::Terminate]
        });
        assert_eq!([at(20, true), at(299, true), at(300, true)], [Step::Wait, Step::Wait, Step::Kill]);
        assert_eq!(at(400, false), Step::Kill, "the host was asleep: there is no time left for asking");
    }

    #[test]
    fn what_was_renewed_is_waited_for_and_what_can_not_be_read_counts_as_not_renewed() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("lease");
        let now = clock::boottime_ns();
        let later = Times { term_ns: u64::MAX / 4, kill_ns: u64::MAX / 4, ..TIMES };
        let passed = Times { term_ns: now, kill_ns: u64::MAX / 4, ..TIMES };
        write(&path, passed).unwrap();
        let mut watch = Watch::begin(&path).unwrap();
        assert!(!watch.allows_start());
        write(&path, later).unwrap();
        assert_eq!(watch.look(), Step::Wait);
        assert!(watch.allows_start() && !watch.has_ended_it());

        write(&path, passed).unwrap();
        let mut watch = Watch::begin(&path).unwrap();
        std::fs::write(&path, "damaged").unwrap();
        assert_eq!(watch.look(), Step::Terminate);
        write(&path, later).unwrap();
        assert_eq!(watch.look(), Step::Wait, "its end is waited for");
        assert!(watch.has_ended_it(), "and there is no way back");
        std::fs::remove_file(&path).unwrap();
        assert!(Watch::begin(&path).is_err(), "nothing is started without the file");
    }
}
