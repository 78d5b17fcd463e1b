//! Where the programs are that `drover dev` starts.

use crate::{arguments::Store, failure::Failure};
use std::{
    ffi::OsString,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

/// The programs of one fleet.
#[derive(Debug, Clone)]
pub struct Programs {
    /// `drover-coordinator`.
    pub coordinator: PathBuf,
    /// `drover-agent`.
    pub agent: PathBuf,
    /// `llama-server`, stock.
    pub llama_server: PathBuf,
    /// `etcd`; none with the store in memory.
    pub etcd: Option<PathBuf>,
}

/// What the environment says about them.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `PATH`.
    pub path: OsString,
    /// `DROVER_LLAMA_SERVER`.
    pub llama_server: Option<PathBuf>,
    /// `DROVER_ETCD`.
    pub etcd: Option<PathBuf>,
}

impl Environment {
    /// That of this process.
    #[must_use]
    pub fn of_process() -> Self {
        let named = |key| std::env::var_os(key).filter(|v| !v.is_empty()).map(PathBuf::from);
        Self {
            path: std::env::var_os("PATH").unwrap_or_default(),
            llama_server: named("DROVER_LLAMA_SERVER"),
            etcd: named("DROVER_ETCD"),
        }
    }
}

/// Finds them: Drover's own beside this program, the others by the environment.
pub fn find(beside: &Path, environment: &Environment, store: Option<Store>) -> Result<Programs, Failure> {
    let own = |name: &str| {
        let path = beside.join(name);
        if is_program(&path) {
            return Ok(path);
        }
        let beside = beside.display();
        Err(Failure::Input(format!(
            "{name} is not in {beside}, beside drover: build all with `cargo build --workspace`"
        )))
    };
    let (coordinator, agent) = (own("drover-coordinator")?, own("drover-agent")?);
    own("drover-shim")?;
    let llama_server = other("llama-server", "DROVER_LLAMA_SERVER", environment.llama_server.as_deref(), environment)?
        .ok_or_else(|| {
            Failure::Input(
                "no llama-server is in PATH, and DROVER_LLAMA_SERVER names none: deploy/quickstart gets one; or build \
                 llama.cpp (https://github.com/ggml-org/llama.cpp) and set DROVER_LLAMA_SERVER=/path/to/llama-server"
                    .to_owned(),
            )
        })?;
    let etcd = match store {
        Some(Store::Memory) => None,
        _ => other("etcd", "DROVER_ETCD", environment.etcd.as_deref(), environment)?,
    };
    if etcd.is_none() && store == Some(Store::Etcd) {
        return Err(Failure::Input(
            "no etcd is in PATH, and DROVER_ETCD names none: install it (Debian: apt install etcd-server), or use \
             --store memory"
                .to_owned(),
        ));
    }
    Ok(Programs { coordinator, agent, llama_server, etcd })
}

/// One named by a variable must be there; else the first in `PATH`.
fn other(
    name: &str,
    variable: &str,
    named: Option<&Path>,
    environment: &Environment,
) -> Result<Option<PathBuf>, Failure> {
    if let Some(path) = named {
        if !is_program(path) {
            return Err(Failure::Input(format!("{variable}={} is no program that can be run", path.display())));
        }
        // Children run elsewhere: a relative path would mean something else there.
        return Ok(Some(std::path::absolute(path).unwrap_or_else(|_| path.to_owned())));
    }
    let found = std::env::split_paths(&environment.path).map(|dir| dir.join(name)).find(|path| is_program(path));
    Ok(found.map(|path| std::path::absolute(&path).unwrap_or(path)))
}

fn is_program(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::File::create(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn own_in(dir: &Path) {
        for name in ["drover-coordinator", "drover-agent", "drover-shim"] {
            program(dir, name);
        }
    }

    #[test]
    fn what_is_missing_is_named_with_the_way_to_get_it() {
        let dir = tempfile::tempdir().unwrap();
        let environment = Environment { path: dir.path().into(), ..Default::default() };
        let refused = |store| find(dir.path(), &environment, store).unwrap_err().message().unwrap().to_owned();
        assert!(refused(None).contains("cargo build --workspace"), "{}", refused(None));
        own_in(dir.path());
        assert!(refused(None).contains("DROVER_LLAMA_SERVER=/path"), "{}", refused(None));
        program(dir.path(), "llama-server");
        assert!(refused(Some(Store::Etcd)).contains("--store memory"));
        assert_eq!(find(dir.path(), &environment, None).unwrap().etcd, None);
        let etcd = program(dir.path(), "etcd");
        assert_eq!(find(dir.path(), &environment, None).unwrap().etcd, Some(etcd));
        assert_eq!(find(dir.path(), &environment, Some(Store::Memory)).unwrap().etcd, None);
    }

    #[test]
    fn a_variable_comes_before_the_path_and_must_name_a_program() {
        let dir = tempfile::tempdir().unwrap();
        own_in(dir.path());
        let named = program(dir.path(), "my-llama");
        let mut environment = Environment { llama_server: Some(named.clone()), ..Default::default() };
        assert_eq!(find(dir.path(), &environment, None).unwrap().llama_server, named);
        environment.etcd = Some(dir.path().join("none"));
        let failure = find(dir.path(), &environment, None).unwrap_err();
        assert!(failure.message().unwrap().starts_with("DROVER_ETCD="), "{failure:?}");
    }
}
