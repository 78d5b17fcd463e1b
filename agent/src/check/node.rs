//! What belongs to the node as a whole: lock, session, machine's identity, sockets, files set aside, leftovers, proxy.

use super::{
    files,
    report::{
        FileReport, FileState, Finding, Instance, Leftover, LockReport, Proxy, Session, SetAside, Severity, Socket,
    },
};
use crate::{
    config::View,
    host::machine,
    instance::{
        adopt::{SET_ASIDE_MAX, is_writing},
        traces,
    },
    link::stored::{self, Stored},
    lock::{self, holder},
};
use drover_shim::durable;
use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

pub(super) fn agent(view: &View, findings: &mut Vec<Finding>) -> LockReport {
    let path = lock::path(&view.state_dir);
    let report = LockReport::from(holder(&path));
    if let LockReport::Unknown(why) = &report {
        let what = format!("it can't be told whether an agent runs: {why}");
        findings.push(
            Finding::new(Severity::Inconsistent, path.display(), what)
                .next_start("the agent itself asks the kernel, and refuses to start beside another one")
                .way_out("run this check as root"),
        );
    }
    report
}

pub(super) fn session(view: &View, findings: &mut Vec<Finding>) -> Session {
    let path = stored::path(&view.state_dir);
    let read = durable::read::<Stored>(&path);
    let file = files::state(&path, read.as_ref());
    findings.extend(files::finding(
        &file,
        "the node waits until its old session has run out and joins anew; its servers go on and are claimed again",
    ));
    let stored = read.unwrap_or_default();
    Session {
        file,
        id: stored.session_id,
        store_generation: stored.store_generation,
        cluster_id: format!("{:x}", stored.cluster_id),
        halt_generation: stored.halt_generation,
    }
}

pub(super) fn machine(view: &View, findings: &mut Vec<Finding>) -> FileReport {
    let path = machine::path(&view.state_dir);
    let file = files::state(&path, durable::read::<String>(&path).as_ref());
    if !matches!(file.state, FileState::Good | FileState::Absent) {
        let finding = Finding::new(Severity::Damaged, path.display(), file.what.clone().unwrap_or_default());
        findings.push(if machine::has_own_id() {
            finding.next_start("nothing: /etc/machine-id is used").way_out("remove the file")
        } else {
            finding.next_start("the agent does not start: the coordinator knows this node by that identity").way_out(
                "remove the file; if the coordinator then takes this for another host, drain and remove the node there",
            )
        });
    }
    file
}

pub(super) fn sockets(view: &View, instances: &[Instance], findings: &mut Vec<Finding>) -> Vec<Socket> {
    // The second one while a proxy is upgraded.
    let own = [proxy_socket(view), view.runtime_dir.join("proxy-next.sock")];
    let mut sockets = Vec::new();
    for path in entries(&view.runtime_dir, findings) {
        let is_socket = fs::symlink_metadata(&path).is_ok_and(|file| file.file_type().is_socket());
        if !is_socket || own.contains(&path) || instances.iter().any(|instance| instance.socket == path) {
            continue;
        }
        let serving = view.llama_server.as_deref().and_then(|program| traces::serves(&path, program));
        let pid = serving.map(|(process, _)| process.pid);
        findings.push(match pid {
            Some(pid) => {
                Finding::new(Severity::Inconsistent, path.display(), format!("pid {pid} serves it for no instance"))
                    .next_start("the agent takes the process for a stale one of its own and ends it")
                    .way_out("drover processes list; drover processes cleanup")
            }
            None => Finding::new(Severity::Note, path.display(), "no instance owns this socket")
                .next_start("it is left alone")
                .way_out("remove it if no process of yours listens on it"),
        });
        sockets.push(Socket { path, pid });
    }
    sockets
}

pub(super) fn set_aside(view: &View, findings: &mut Vec<Finding>) -> Vec<SetAside> {
    let mut paths = entries(&view.state_dir.join("damaged"), findings);
    paths.extend(Some(stored::path(&view.state_dir).with_extension("damaged")).filter(|path| path.exists()));
    let mut all: Vec<SetAside> = paths
        .into_iter()
        .filter_map(|path| {
            // A file's renaming is the last change of its inode.
            let file = fs::metadata(&path).ok()?;
            let at_ms = file.ctime().saturating_mul(1000).saturating_add(file.ctime_nsec() / 1_000_000);
            let why = match durable::read::<serde_json::Value>(&path) {
                Ok(_) => "its content is not of the form that this version expects".to_owned(),
                Err(durable::Error::Damaged { what, .. }) => what,
                Err(error) => error.to_string(),
            };
            Some(SetAside { path, at_ms, why })
        })
        .collect();
    all.sort_by_key(|file| std::cmp::Reverse(file.at_ms));
    all.truncate(SET_ASIDE_MAX);
    for file in &all {
        findings.push(
            Finding::new(
                Severity::Note,
                file.path.display(),
                format!("it was found damaged and set aside: {}", file.why),
            )
            .next_start("nothing reads it any more")
            .way_out("remove it when its damage is understood"),
        );
    }
    all
}

pub(super) fn leftovers(view: &View, instances: &[Instance], findings: &mut Vec<Finding>) -> Vec<Leftover> {
    let folders = instances.iter().filter_map(|instance| instance.record.path.parent().map(Path::to_owned));
    let mut all = Vec::new();
    for folder in [view.state_dir.clone()].into_iter().chain(folders) {
        for left in durable::leftovers(&folder).unwrap_or_default() {
            let writer_lives = is_writing(left.writer);
            let (what, next_start) = if writer_lives {
                (format!("pid {} is writing it, or was", left.writer), "it is left alone while that process lives")
            } else {
                (format!("the rest of a write of pid {}, which has ended", left.writer), "it is removed")
            };
            findings.push(
                Finding::new(Severity::Note, left.path.display(), what)
                    .next_start(next_start)
                    .way_out("nothing has to be done"),
            );
            all.push(Leftover { path: left.path, writer: left.writer, writer_lives });
        }
    }
    all
}

pub(super) fn proxy(view: &View, agent: &LockReport, findings: &mut Vec<Finding>) -> Proxy {
    let socket = proxy_socket(view);
    let lock = LockReport::from(holder(&view.runtime_dir.join("proxy.lock")));
    let runs = matches!(lock, LockReport::Process(_));
    if !runs && matches!(agent, LockReport::Process(_)) {
        findings.push(
            Finding::new(Severity::Inconsistent, socket.display(), "an agent runs, but no proxy")
                .next_start("a running agent starts a proxy within a second; so does the next one")
                .way_out("look again; if there is none still, the agent's log and proxy.log say why"),
        );
    }
    let address_file = view.state_dir.join("proxy.address");
    let address = fs::read_to_string(&address_file).ok().map(|text| text.trim().to_owned());
    if address.as_ref().is_some_and(|text| text.parse::<SocketAddr>().is_err()) {
        findings.push(
            Finding::new(Severity::Damaged, address_file.display(), "it is no address")
                .next_start("a living proxy tells its address; a new one takes any free port where none is configured")
                .way_out("nothing has to be done: it is written anew"),
        );
    }
    for (path, forbidden, what) in [
        (Some(socket.clone()), 0o177, "whoever may connect to it may order the proxy"),
        (view.join_secret_file.clone(), 0o077, "whoever may read it may join the fleet"),
    ] {
        let Some(path) = path else { continue };
        match fs::metadata(&path) {
            Ok(file) if file.permissions().mode() & forbidden != 0 => findings.push(
                Finding::new(Severity::Inconsistent, path.display(), format!("it is open to others: {what}"))
                    .next_start("it is used all the same, with a warning")
                    .way_out(format!("chmod 600 {}", path.display())),
            ),
            Err(error) if view.join_secret_file.as_ref() == Some(&path) => findings.push(
                Finding::new(Severity::Damaged, path.display(), format!("the join secret can't be read: {error}"))
                    .next_start("the agent does not start; a proxy that runs goes on")
                    .way_out("put the fleet's join secret there, or name another file with join_secret_file"),
            ),
            _ => {}
        }
    }
    Proxy {
        lock,
        address,
        socket_mode: files::mode(&socket),
        socket,
        secret_file_mode: view.join_secret_file.as_deref().and_then(files::mode),
        secret_file: view.join_secret_file.clone(),
    }
}

fn proxy_socket(view: &View) -> PathBuf {
    view.runtime_dir.join("proxy.sock")
}

/// What a folder holds, in the order of names; nothing where there is none.
fn entries(folder: &Path, findings: &mut Vec<Finding>) -> Vec<PathBuf> {
    match fs::read_dir(folder) {
        Ok(entries) => {
            let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            paths.sort();
            paths
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            findings.push(
                Finding::new(Severity::Damaged, folder.display(), format!("it can't be listed: {error}"))
                    .next_start("the agent does not start where it can't list it either")
                    .way_out("make it a folder that the agent's user can read"),
            );
            Vec::new()
        }
    }
}
