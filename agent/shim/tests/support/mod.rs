//! A stage for the shim's tests: an instance's directory, a spec, a real shim.
#![allow(dead_code, clippy::disallowed_methods, reason = "tests start programs; each test uses a part of this")]

use drover_shim::{
    clock, identity,
    record::{self, Directory, Exit, Record, SPEC_FORMAT, Spec, Token},
};
use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Stage {
    pub root: tempfile::TempDir,
    pub directory: Directory,
}

impl Stage {
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("one");
        fs::create_dir(&path).unwrap();
        Self { root, directory: Directory::new(path) }
    }

    pub fn spec(&self, program: impl Into<PathBuf>, arguments: &[&str]) -> Spec {
        Spec {
            format: SPEC_FORMAT,
            instance: "one".to_owned(),
            token: Token { generation: 1, revision: 10 },
            program: program.into(),
            arguments: arguments.iter().map(|&a| a.to_owned()).collect(),
            environment: vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())],
            socket: self.root.path().join("one.sock"),
            log_bytes_max: 10 << 20,
            log_files_max: 3,
            start_deadline_ns: clock::boottime_ns() + 60_000_000_000,
            boot_id: identity::boot_id().unwrap(),
            halt_file: self.root.path().join("halt"),
            cgroup_base: None,
            ends_with_lease: false,
        }
    }

    pub fn shell(&self, script: &str) -> Spec {
        self.spec("/bin/sh", &["-c", script])
    }

    pub fn write(&self, spec: &Spec) {
        record::write(&self.directory.spec(), spec).unwrap();
    }

    /// Starts a shim on this directory.
    pub fn shim(&self) -> Shim {
        let mut child = Command::new(env!("CARGO_BIN_EXE_drover-shim"))
            .arg(self.directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Shim { child, output }
    }

    pub fn run(&self, spec: &Spec) -> Shim {
        self.write(spec);
        self.shim()
    }

    pub fn record(&self) -> Record {
        record::read(&self.directory.record()).unwrap()
    }

    pub fn exit(&self) -> Exit {
        wait_for("the record of the end", || record::read(&self.directory.exit()).ok())
    }

    pub fn log(&self) -> String {
        drover_shim::logs::files(&self.directory.log()).iter().map(|f| fs::read_to_string(f).unwrap()).collect()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Nothing of a failed test may live on: end what was recorded, if it is still that.
        if let Ok(record) = record::read::<Record>(&self.directory.record())
            && identity::verify(&record.process, Some(&record.shim)) == identity::Verdict::Same
        {
            kill(record.process.pid);
        }
    }
}

pub struct Shim {
    pub child: Child,
    output: BufReader<ChildStdout>,
}

impl Shim {
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub fn released(&mut self) -> i32 {
        let held = self.line();
        let released = self.line();
        let pid = released.strip_prefix("released ").unwrap_or_else(|| panic!("the shim said: {held} / {released}"));
        pid.parse().unwrap()
    }

    /// Exit code, and the last line that was said.
    pub fn refused(mut self) -> (i32, String) {
        let mut said = String::new();
        loop {
            let line = self.line();
            if line.is_empty() {
                break;
            }
            said = line;
        }
        (self.child.wait().unwrap().code().unwrap(), said)
    }
}

pub fn kill(pid: i32) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
}

pub fn is_alive(pid: i32) -> bool {
    identity::stat(pid).is_ok_and(|s| s.state != 'Z')
}

pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub fn wait_gone(pid: i32) {
    wait_for(&format!("the end of pid {pid}"), || (!is_alive(pid)).then_some(()));
}

pub fn llama_server() -> PathBuf {
    std::env::var_os("DROVER_LLAMA_SERVER")
        .map(PathBuf::from)
        .filter(|path| Path::new(path).is_file())
        .expect("DROVER_LLAMA_SERVER must name a llama-server: run tests/run, which provides one")
}
