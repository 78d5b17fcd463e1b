//! A folder of models whose file system hangs holds up the starts from there, which say so, and nothing else.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test"
)]

mod support;
use drover_proto::v1::{DeploymentSpec, InstanceState};
use nix::sys::signal::Signal;
use std::{
    ffi::CString,
    fs::{self, File},
    os::{fd::AsRawFd as _, unix::ffi::OsStrExt as _},
    path::Path,
};
use support::{Node, signal, tiny, wait_for};

/// A file system that answers nothing: nobody reads what the kernel asks of it. Without rights or FUSE there is none.
struct Hung {
    _device: File,
    path: CString,
}

impl Hung {
    fn mount(path: &Path) -> Option<Self> {
        let device = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let data = CString::new(format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd())).unwrap();
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: all are strings that end with a zero and outlive the call.
        #[allow(unsafe_code, reason = "nix is built without its mounts")]
        let done = unsafe { libc::mount(c"hung".as_ptr(), path.as_ptr(), c"fuse".as_ptr(), 0, data.as_ptr().cast()) };
        (done == 0).then_some(Self { _device: device, path })
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        // Whatever waits for it gets an error when the device is closed, which is next.
        // SAFETY: the string ends with a zero and outlives the call.
        #[allow(unsafe_code, reason = "nix is built without its mounts")]
        let done = unsafe { libc::umount2(self.path.as_ptr(), libc::MNT_DETACH) };
        assert_eq!(done, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn more_starts_than_the_agent_has_threads() {
    let mut node = Node::idle("[restarts]\nbackoff_first_ms = 10\nbackoff_max_ms = 100\n").await;
    let folder = node.path("models/far");
    fs::create_dir(&folder).unwrap();
    fs::copy(node.path("models/tiny.gguf"), folder.join("far.gguf")).unwrap();
    node.start_agent().await;
    let far = DeploymentSpec { model_path: "far/far.gguf".to_owned(), ..tiny() };
    let threads = std::thread::available_parallelism().unwrap().get();
    let ids: Vec<String> = (0..=threads).map(|n| format!("far{n}-234567")).collect();
    let mut pids = Vec::new();
    for id in &ids {
        node.coordinator.offer(id, far.clone());
        pids.push(node.reported(id, InstanceState::Ready).await.pid);
    }
    node.run("near-234567").await;
    let Some(hung) = Hung::mount(&folder) else {
        eprintln!("skipped: a file system can't be mounted here (root and /dev/fuse are needed)");
        return;
    };
    for pid in pids {
        signal(pid, Signal::SIGKILL);
    }
    for id in &ids {
        node.report("a start under way", id, |r| r.restarts == 0 && r.exit_signal == Some(9)).await;
    }
    // The others go on meanwhile: started again, stopped, and new ones started.
    let near = node.reported("near-234567", InstanceState::Ready).await;
    signal(near.pid, Signal::SIGKILL);
    node.report("the restart", "near-234567", |r| r.state() == InstanceState::Ready && r.pid != near.pid).await;
    node.coordinator.offer("far9-234567", far);
    node.run("new-234567").await;
    for id in &ids {
        let told = || node.events(id, "BackOff").into_iter().find(|m| m.contains("model_path \"far/far.gguf\""));
        let told = wait_for("the reason", told).await;
        assert!(told.contains("no answer within 10s"), "{told}");
    }
    node.coordinator.stop("new-234567");
    node.nothing_left("new-234567", "beside a hung folder").await;
    // A stop wins over what hangs, too.
    node.coordinator.stop(&ids[0]);
    node.nothing_left(&ids[0], "in a hung folder").await;
    drop(hung);
    for id in &ids[1..] {
        node.reported(id, InstanceState::Ready).await;
    }
}
