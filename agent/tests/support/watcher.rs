//! Looks at the host all the while: no instance may have two servers at any moment, nor one that no record names.

use drover_shim::{
    durable, identity,
    record::{Directory, Record},
};
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// Pause between two looks: a server takes longer than this to begin and to end.
const PAUSE: Duration = Duration::from_millis(5);

/// Pids of the living processes whose command lines fit.
pub fn processes(fits: impl Fn(&[String]) -> bool) -> Vec<i32> {
    let pids = fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|&pid| {
        let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
        let words: Vec<String> = line.split(|&b| b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        fits(&words) && identity::stat(pid).is_ok_and(|s| s.state != 'Z')
    })
    .collect()
}

/// Servers of a folder's instances that execute their program, with the instance.
pub fn servers(root: &Path, program: &Path) -> Vec<(i32, String)> {
    let program = fs::canonicalize(program).unwrap();
    let pids = fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| identity::executable(*pid).is_ok_and(|e| e == program))
        .filter_map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let words: Vec<String> = line.split(|&b| b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
            let socket = words.iter().skip_while(|word| *word != "--host").nth(1)?;
            let socket = Path::new(socket);
            let alive = identity::stat(pid).is_ok_and(|s| s.state != 'Z');
            (alive && socket.starts_with(root))
                .then(|| (pid, socket.file_stem().unwrap().to_string_lossy().into_owned()))
        })
        .collect()
}

/// Watches until it is dropped.
pub struct Watcher {
    ended: Arc<AtomicBool>,
    seen: Arc<Mutex<(u64, Vec<String>)>>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Watches the instances of a node's folder, whose servers execute this program.
    pub fn start(root: &Path, program: &Path) -> Self {
        let (root, program) = (root.to_owned(), fs::canonicalize(program).unwrap());
        let (ended, seen) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new((0, Vec::new()))));
        let thread = {
            let (ended, seen) = (ended.clone(), seen.clone());
            std::thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    let (found, wrong) = look(&root, &program);
                    let mut seen = seen.lock().unwrap();
                    seen.0 += found;
                    seen.1.extend(wrong);
                    drop(seen);
                    std::thread::sleep(PAUSE);
                }
            })
        };
        Self { ended, seen, thread: Some(thread) }
    }

    /// Fails when a rule was broken so far.
    pub fn saw_no_fault(&self, what: &str) {
        let seen = self.seen.lock().unwrap();
        assert!(seen.1.is_empty(), "{what}: {:?}", seen.1);
    }

    /// How many servers were looked at.
    pub fn looked_at(&self) -> u64 {
        self.seen.lock().unwrap().0
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn look(root: &Path, program: &Path) -> (u64, Vec<String>) {
    let servers = servers(root, program);
    let found = servers.len() as u64;
    let mut wrong = Vec::new();
    let mut by_instance: BTreeMap<String, Vec<i32>> = BTreeMap::new();
    for (pid, instance) in servers {
        let directory = Directory::new(root.join("state/instances").join(&instance));
        let recorded = durable::read::<Record>(&directory.record()).map(|record| record.process.pid);
        // Both were read at different moments: only one that lives on was unrecorded while it ran.
        let lives = || {
            identity::executable(pid).is_ok_and(|e| e == program) && identity::stat(pid).is_ok_and(|s| s.state != 'Z')
        };
        if !recorded.as_ref().is_ok_and(|recorded| *recorded == pid) && lives() {
            wrong.push(format!("{instance}: pid {pid} runs, and the record says {recorded:?}"));
        }
        by_instance.entry(instance).or_default().push(pid);
    }
    for (instance, pids) in by_instance {
        let alive: Vec<i32> =
            pids.into_iter().filter(|&pid| identity::stat(pid).is_ok_and(|s| s.state != 'Z')).collect();
        if alive.len() > 1 {
            wrong.push(format!("{instance}: {} servers at a time: {alive:?}", alive.len()));
        }
    }
    (found, wrong)
}
