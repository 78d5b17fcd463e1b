//! In which cgroups a process is, as paths of this mount namespace.
//!
//! /proc/<pid>/cgroup gives paths within each hierarchy, /proc/self/mountinfo says where the hierarchies are mounted, and
//! which part of them. A host may have version 1, version 2, or both side by side.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The cgroups of a process that are of use here; `None` where there is none, or none that can be seen.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Membership {
    /// Of version 2.
    pub unified: Option<PathBuf>,
    /// Of version 1's memory controller.
    pub memory: Option<PathBuf>,
}

/// The cgroups of a process.
#[must_use]
pub fn of(pid: i32) -> Membership {
    let read = |path: String| fs::read_to_string(path).unwrap_or_default();
    parse(&read(format!("/proc/{pid}/cgroup")), &read("/proc/self/mountinfo".to_owned()))
}

struct Mount<'a> {
    /// Part of the hierarchy that is mounted.
    root: &'a Path,
    point: &'a Path,
    kind: &'a str,
    options: &'a str,
}

/// The form is in proc_pid_mountinfo(5). A mount point with a blank in its name is passed over.
fn mounts(text: &str) -> impl Iterator<Item = Mount<'_>> {
    text.lines().filter(|line| !line.contains('\\')).filter_map(|line| {
        let (place, what) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (root, point) = (place.next()?, place.next()?);
        let mut what = what.split(' ');
        let (kind, _, options) = (what.next()?, what.next()?, what.next()?);
        Some(Mount { root: Path::new(root), point: Path::new(point), kind, options })
    })
}

fn parse(cgroups: &str, mountinfo: &str) -> Membership {
    let path_of = |is: &dyn Fn(&str, &str) -> bool| {
        cgroups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            is(number, controllers).then_some(Path::new(path))
        })
    };
    let locate = |path: &Path, is: &dyn Fn(&Mount<'_>) -> bool| {
        // "/.." begins the path of one outside of our cgroup namespace.
        if path.components().any(|part| part == std::path::Component::ParentDir) {
            return None;
        }
        mounts(mountinfo).filter(|mount| is(mount)).find_map(|mount| {
            let below = path.strip_prefix(mount.root).ok()?;
            // An empty rest would leave a slash at the end.
            Some(if below.as_os_str().is_empty() { mount.point.to_owned() } else { mount.point.join(below) })
        })
    };
    let has_memory = |list: &str| list.split(',').any(|name| name == "memory");
    Membership {
        unified: path_of(&|number, controllers| number == "0" && controllers.is_empty())
            .and_then(|path| locate(path, &|mount| mount.kind == "cgroup2")),
        memory: path_of(&|_, controllers| has_memory(controllers))
            .and_then(|path| locate(path, &|mount| mount.kind == "cgroup" && has_memory(mount.options))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(cgroups: &str, mountinfo: &str) -> [Option<String>; 2] {
        let Membership { unified, memory } = parse(cgroups, mountinfo);
        [unified, memory].map(|path| path.map(|p| p.display().to_string()))
    }

    #[test]
    fn version_2_alone_as_systemd_mounts_it() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
        let expected = [Some("/sys/fs/cgroup/system.slice/drover-agent.service".to_owned()), None];
        assert_eq!(found("0::/system.slice/drover-agent.service\n", mounts), expected);
        assert_eq!(found("0::/\n", mounts), [Some("/sys/fs/cgroup".to_owned()), None]);
        assert_eq!(found("0::/../other\n", mounts), [None, None]);
    }

    #[test]
    fn both_versions_side_by_side() {
        let mounts = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let expected = [Some("/sys/fs/cgroup/unified".to_owned()), Some("/sys/fs/cgroup/memory/a/b".to_owned())];
        assert_eq!(found("4:memory:/a/b\n1:cpu:/\n0::/\n", mounts), expected);
    }

    #[test]
    fn a_part_of_the_hierarchy_as_containers_see_it() {
        let mounts = "35 31 0:32 /docker/x /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        let within = [None, Some("/sys/fs/cgroup/memory/y".to_owned())];
        assert_eq!(found("4:memory:/docker/x/y\n0::/z\n", mounts), within);
        assert_eq!(found("4:memory:/docker/other\n", mounts), [None, None]);
    }
}
