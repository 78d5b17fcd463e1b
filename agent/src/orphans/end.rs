//! Ends one process whose identity is verified, with all that it has started: SIGTERM first, SIGKILL where that is asked
//! for.

use crate::host::{
    processes::{self, Found, Living},
    scan::Seen,
    tree::Tree,
};
use drover_proto::v1::ProcessAction;
use drover_shim::identity;
use std::{io, time::Duration};
use tokio::time::timeout;

/// How long a killed process is waited for.
const KILLED: Duration = Duration::from_secs(2);

/// How long a process may take to end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// After SIGTERM.
    term: Duration,
    /// Whether SIGKILL follows.
    kill: bool,
}

impl Patience {
    /// Of an operator who asks for it.
    pub(super) fn asked(force: bool) -> Self {
        Self { term: Duration::from_secs(if force { 2 } else { 5 }), kill: force }
    }

    /// With a stale process of this agent.
    pub(super) fn stale() -> Self {
        Self { term: Duration::from_secs(10), kill: true }
    }
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Ended,
    Lives,
    LeftAlone,
}

impl Outcome {
    pub(super) fn is_over(self) -> bool {
        self == Self::Ended
    }

    pub(super) fn action(self) -> ProcessAction {
        match self {
            Self::Ended => ProcessAction::Ended,
            Self::Lives => ProcessAction::ToldToEnd,
            Self::LeftAlone => ProcessAction::LeftAlone,
        }
    }
}

/// Takes hold of a process, if it is still the one that was seen.
fn hold(seen: &Seen, boot_id: &str) -> Result<Living, (Outcome, String)> {
    let Some(executable) = seen.executable.clone() else {
        let why = "its executable can't be read, so it can't be told what it is".to_owned();
        return Err((Outcome::LeftAlone, why));
    };
    let (pid, start_ticks) = (seen.pid, seen.start_ticks);
    let process = identity::Process { boot_id: boot_id.to_owned(), pid, start_ticks, executable, file: None };
    match processes::find_process(&process, None) {
        Found::Living(living) => Ok(living),
        Found::Gone => Err((Outcome::Ended, "it had ended already".to_owned())),
        Found::Other(what) => Err((Outcome::Ended, format!("it had ended already: {what}"))),
        Found::Unknown(why) => Err((Outcome::LeftAlone, why)),
    }
}

/// Waits for the end of a process that somebody else was told to end; says how that went.
pub(super) async fn wait(seen: &Seen, boot_id: &str, patience: Patience) -> (Outcome, String) {
    let living = match hold(seen, boot_id) {
        Ok(living) => living,
        Err(outcome) => return outcome,
    };
    match timeout(patience.term + KILLED, living.ended()).await {
        Ok(()) => (Outcome::Ended, "ended without waiting for requests in flight".to_owned()),
        Err(_) => (Outcome::Lives, "lives still after SIGKILL: it waits for the kernel".to_owned()),
    }
}

/// Ends a process, if it is still the one that was seen; says how that went.
pub(super) async fn end(seen: &Seen, boot_id: &str, patience: Patience) -> (Outcome, String) {
    let living = match hold(seen, boot_id) {
        Ok(living) => living,
        Err(outcome) => return outcome,
    };
    // Before its end: afterwards nothing names what it has started.
    let (living, tree) = match search(living).await {
        Ok(found) => found,
        Err(error) => return (Outcome::LeftAlone, format!("what it has started can't be looked up: {error}")),
    };
    if let Err(error) = living.terminate() {
        return (Outcome::LeftAlone, format!("SIGTERM was refused: {error}"));
    }
    let by_term = timeout(patience.term, async {
        living.ended().await;
        let left = tree.living().len();
        if left > 0 {
            tree.terminate();
            tree.ended().await;
        }
        left
    });
    let waited = patience.term.as_secs();
    match by_term.await {
        Ok(0) => return (Outcome::Ended, "ended by SIGTERM".to_owned()),
        Ok(left) => return (Outcome::Ended, format!("ended by SIGTERM, with {left} processes that it had started")),
        Err(_) if patience.kill => {}
        Err(_) => {
            let what = remaining(&living, &tree);
            return (Outcome::Lives, format!("{what} still {waited} s after SIGTERM: force ends it at once"));
        }
    }
    kill(living, tree, waited).await
}

async fn kill(living: Living, tree: Tree, waited: u64) -> (Outcome, String) {
    let killed = blocking(move || {
        let mut tree = tree;
        let killed = tree.kill(&living);
        Ok((living, tree, killed))
    });
    let (living, tree) = match killed.await {
        Ok((living, tree, Ok(()))) => (living, tree),
        Ok((_, _, Err(error))) | Err(error) => {
            return (Outcome::Lives, format!("lives still {waited} s after SIGTERM, and SIGKILL was refused: {error}"));
        }
    };
    let all = timeout(KILLED, async {
        living.ended().await;
        tree.ended().await;
    });
    match all.await {
        Ok(()) => (Outcome::Ended, format!("ended by SIGKILL, {waited} s after SIGTERM")),
        Err(_) => {
            let what = remaining(&living, &tree);
            (Outcome::Lives, format!("{what} still after SIGKILL: waits for the kernel"))
        }
    }
}

/// Who lives, for people.
fn remaining(living: &Living, tree: &Tree) -> String {
    let pids: Vec<String> = tree.living().iter().take(8).map(ToString::to_string).collect();
    let lives = identity::stat(living.pid()).is_ok_and(|s| s.start_ticks == living.start_ticks() && s.state != 'Z');
    match (lives, pids.is_empty()) {
        (_, true) => "lives".to_owned(),
        (true, false) => format!("lives with what it has started (pid {}),", pids.join(", ")),
        (false, false) => format!("has ended, but what it has started lives (pid {})", pids.join(", ")),
    }
}

async fn search(living: Living) -> io::Result<(Living, Tree)> {
    blocking(move || {
        let tree = Tree::below(&living)?;
        Ok((living, tree))
    })
    .await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "starts programs to end them")]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    /// A shell, in the session of this test as a server started by hand is in its starter's.
    struct Shell(Child);

    impl Shell {
        fn start(script: &str) -> Self {
            let mut command = Command::new("/bin/bash");
            Self(command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap())
        }

        /// Ids that it prints, one a line.
        fn pids(&mut self, count: usize) -> Vec<i32> {
            use io::BufRead as _;
            let lines = io::BufReader::new(self.0.stdout.take().unwrap()).lines();
            lines.take(count).map(|line| line.unwrap().parse().unwrap()).collect()
        }

        fn seen(&self) -> Seen {
            let pid = i32::try_from(self.0.id()).unwrap();
            Seen {
                pid,
                start_ticks: identity::stat(pid).unwrap().start_ticks,
                executable: Some(identity::executable(pid).unwrap()),
                arguments: vec![],
                rss_bytes: 0,
                kept_by_shim: false,
                unreadable: None,
            }
        }
    }

    impl Drop for Shell {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn lives(pid: i32) -> bool {
        identity::stat(pid).is_ok_and(|s| !matches!(s.state, 'Z' | 'X'))
    }

    fn boot() -> String {
        identity::boot_id().unwrap()
    }

    fn patience(ms: u64, kill: bool) -> Patience {
        Patience { term: Duration::from_millis(ms), kill }
    }

    const STUBBORN: &str = "trap '' TERM; (trap '' TERM; echo $BASHPID; sleep 600 & echo $!; wait) & \
        (exec sleep 600) & echo $!; wait; sleep 600";

    #[tokio::test]
    async fn a_tree_that_ignores_sigterm_is_killed_whole_and_its_starter_lives() {
        let mut shell = Shell::start(STUBBORN);
        let below = shell.pids(3);
        let (outcome, how) = end(&shell.seen(), &boot(), patience(200, true)).await;
        assert_eq!(outcome, Outcome::Ended, "{how}");
        assert!(how.contains("SIGKILL"), "{how}");
        assert_eq!(below.iter().filter(|pid| lives(**pid)).count(), 0, "{below:?}");
    }

    #[tokio::test]
    async fn without_force_it_is_told_and_lives_and_a_child_that_stays_behind_is_named() {
        let mut shell = Shell::start(STUBBORN);
        let below = shell.pids(3);
        let (outcome, how) = end(&shell.seen(), &boot(), patience(200, false)).await;
        assert_eq!(outcome, Outcome::Lives, "{how}");
        assert!(how.contains("force"), "{how}");
        end(&shell.seen(), &boot(), patience(1, true)).await;
        assert!(below.iter().all(|pid| !lives(*pid)));

        let mut shell = Shell::start("(trap '' TERM; echo $BASHPID; while :; do sleep 1; done) & wait");
        let child = shell.pids(1)[0];
        let (outcome, how) = end(&shell.seen(), &boot(), patience(500, false)).await;
        assert_eq!(outcome, Outcome::Lives, "{how}");
        assert!(how.contains("has ended, but what it has started lives") && how.contains(&child.to_string()), "{how}");
        assert!(lives(child));
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::Signal::SIGKILL).unwrap();
    }

    #[tokio::test]
    async fn one_that_forks_without_end_is_killed_whole() {
        let mut shell = Shell::start(
            "trap '' TERM; echo $$; f() { trap '' TERM; while :; do (exec sleep 0.5) & done; }; f & f & f",
        );
        shell.pids(1);
        let mark = shell.0.id();
        let (outcome, how) = end(&shell.seen(), &boot(), patience(100, true)).await;
        assert_eq!(outcome, Outcome::Ended, "{how}");
        let left = |_: ()| {
            let all = std::fs::read_dir("/proc").unwrap().flatten();
            all.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok())
                .filter(|pid| {
                    identity::stat(*pid).is_ok_and(|s| u32::try_from(s.parent).ok() == Some(mark) && s.state != 'Z')
                })
                .count()
        };
        assert_eq!(left(()), 0);
    }

    #[tokio::test]
    async fn a_process_that_is_not_the_one_seen_is_not_touched() {
        let mut shell = Shell::start("echo $$; sleep 600");
        let pid = shell.pids(1)[0];
        let seen = shell.seen();
        let other = [
            Seen { start_ticks: seen.start_ticks + 1, ..seen.clone() },
            Seen { executable: Some("/opt/llama-server".into()), ..seen.clone() },
            Seen { executable: None, ..seen.clone() },
        ];
        for other in other {
            end(&other, &boot(), patience(100, true)).await;
            assert!(lives(pid), "{other:?}");
        }
        end(&seen, "another boot", patience(100, true)).await;
        assert!(lives(pid));
    }
}
