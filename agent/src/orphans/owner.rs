//! PURE: to whom a llama-server process belongs.

use crate::host::scan::Seen;
use drover_proto::v1::{ProcessOwner, Token};
use drover_shim::identity;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// What this agent has of an instance.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Kept {
    /// Process that its record names; `None` while there is no record, or none that can be read.
    pub(super) process: Option<identity::Process>,
    /// Token of the record.
    pub(super) token: Option<Token>,
    /// Whether the agent knows the instance still.
    pub(super) known: bool,
}

/// What this agent has.
#[derive(Debug, Default)]
pub(super) struct Own {
    /// By instance: those that the agent knows, and those with a folder on disk.
    pub(super) instances: BTreeMap<String, Kept>,
    /// The instance of each socket.
    pub(super) sockets: BTreeMap<PathBuf, String>,
    /// Where the sockets of this agent lie.
    pub(super) runtime_dir: PathBuf,
    /// Boot that this is.
    pub(super) boot_id: String,
}

impl Own {
    /// Whether a record names this process: boot, pid and start time do, even if its executable was renamed meanwhile.
    fn names(&self, process: &identity::Process, seen: &Seen) -> bool {
        (process.pid, process.start_ticks) == (seen.pid, seen.start_ticks) && process.boot_id == self.boot_id
    }
}

/// To whom a process belongs, and why.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Belongs {
    pub(super) owner: ProcessOwner,
    pub(super) instance: String,
    pub(super) token: Option<Token>,
    pub(super) message: String,
}

/// Decides by the record first, which names a process whole, then by the socket that the process was given.
pub(super) fn of(seen: &Seen, own: &Own) -> Belongs {
    let belongs = |owner, instance: &str, token, message: &str| Belongs {
        owner,
        instance: instance.to_owned(),
        token,
        message: message.to_owned(),
    };
    let named = |kept: &Kept| kept.process.as_ref().is_some_and(|process| own.names(process, seen));
    let recorded = own.instances.iter().find(|(_, kept)| named(kept));
    if let Some((instance, kept)) = recorded {
        if kept.known {
            return belongs(ProcessOwner::Owned, instance, kept.token, "");
        }
        let why = "its record stands, but the agent keeps no such instance any more";
        return belongs(ProcessOwner::Stale, instance, kept.token, why);
    }
    if let Some(why) = &seen.unreadable {
        return belongs(ProcessOwner::Unknown, "", None, why);
    }
    if let Some(socket) = seen.host().map(Path::new)
        && socket.parent() == Some(own.runtime_dir.as_path())
    {
        let instance = own.sockets.get(socket);
        return match instance.and_then(|id| Some((id, own.instances.get(id)?))) {
            None => {
                belongs(ProcessOwner::Stale, "", None, "its socket is this agent's, but no instance has it any more")
            }
            Some((id, Kept { process: Some(process), .. })) => {
                let why = format!("the record of {id} names another process, pid {}", process.pid);
                belongs(ProcessOwner::Stale, id, None, &why)
            }
            Some((id, _)) => belongs(ProcessOwner::Unknown, id, None, &format!("{id} has no record that can be read")),
        };
    }
    if seen.kept_by_shim {
        return belongs(ProcessOwner::OtherAgent, "", None, "a shim of another agent keeps it");
    }
    belongs(ProcessOwner::Foreign, "", None, "no agent has started it")
}

/// Whether its memory is taken off what the node has to give. What other agents of the host keep is not: agents that
/// share a host share its memory by their configuration.
pub(super) fn takes(owner: ProcessOwner) -> bool {
    matches!(owner, ProcessOwner::Stale | ProcessOwner::Foreign | ProcessOwner::Unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(pid: i32, host: &str) -> Seen {
        Seen {
            pid,
            start_ticks: 7,
            executable: Some("/opt/llama-server".into()),
            arguments: ["llama-server", "--host", host].map(str::to_owned).to_vec(),
            rss_bytes: 1,
            kept_by_shim: false,
            unreadable: None,
        }
    }

    fn own() -> Own {
        let process = |pid| identity::Process {
            boot_id: "this".to_owned(),
            pid,
            start_ticks: 7,
            executable: "/opt/llama-server".into(),
            file: None,
        };
        let kept = |process, known| Kept { process, token: None, known };
        Own {
            instances: BTreeMap::from([
                ("m-a".to_owned(), kept(Some(process(10)), true)),
                ("m-b".to_owned(), kept(Some(process(20)), false)),
                ("m-c".to_owned(), kept(None, true)),
            ]),
            boot_id: "this".to_owned(),
            sockets: ["m-a", "m-b", "m-c"].map(|id| (format!("/run/d/{id}.sock").into(), id.to_owned())).into(),
            runtime_dir: "/run/d".into(),
        }
    }

    #[test]
    fn a_record_names_its_process_whole() {
        let found = of(&seen(10, "/run/d/m-a.sock"), &own());
        assert_eq!((found.owner, found.instance.as_str()), (ProcessOwner::Owned, "m-a"));
        assert_eq!(of(&seen(20, "/run/d/m-b.sock"), &own()).owner, ProcessOwner::Stale);
        // The same pid, but started at another time.
        let reused = Seen { start_ticks: 8, ..seen(10, "127.0.0.1") };
        assert_eq!(of(&reused, &own()).owner, ProcessOwner::Foreign);
        // The same pid and start time after another boot.
        let rebooted = Own { boot_id: "the next".to_owned(), ..own() };
        assert_eq!(of(&seen(20, "127.0.0.1"), &rebooted).owner, ProcessOwner::Foreign);
        let hidden = Seen { executable: None, unreadable: Some("hidden".to_owned()), ..seen(10, "x") };
        assert_eq!(of(&hidden, &own()).owner, ProcessOwner::Owned);
    }

    #[test]
    fn a_socket_of_this_agent_makes_it_stale_unless_its_instance_has_no_record() {
        assert_eq!(of(&seen(11, "/run/d/m-a.sock"), &own()).owner, ProcessOwner::Stale);
        assert_eq!(of(&seen(11, "/run/d/m-z.sock"), &own()).owner, ProcessOwner::Stale);
        assert_eq!(of(&seen(11, "/run/d/m-c.sock"), &own()).owner, ProcessOwner::Unknown);
        assert_eq!(of(&seen(11, "/run/other/m-a.sock"), &own()).owner, ProcessOwner::Foreign);
    }

    #[test]
    fn what_another_shim_keeps_and_what_can_not_be_read_is_not_ours_to_end() {
        let kept = Seen { kept_by_shim: true, ..seen(30, "/run/other/m-a.sock") };
        assert_eq!(of(&kept, &own()).owner, ProcessOwner::OtherAgent);
        let hidden = Seen { unreadable: Some("its executable can't be read".to_owned()), ..seen(31, "x") };
        let found = of(&hidden, &own());
        assert_eq!((found.owner, found.message.as_str()), (ProcessOwner::Unknown, "its executable can't be read"));
        assert!(takes(ProcessOwner::Foreign) && !takes(ProcessOwner::Owned) && !takes(ProcessOwner::OtherAgent));
    }
}
