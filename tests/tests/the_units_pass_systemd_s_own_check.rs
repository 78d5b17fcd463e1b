//! The systemd units are ones that systemd itself takes, and servers outlive the agent's unit.

use anyhow::{Context as _, ensure};
use drover_tests::programs::program;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// Where the units expect our programs.
const INSTALLED: &str = "/usr/local/bin";

fn unit(name: &str) -> anyhow::Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd").join(name);
    fs::read_to_string(&path).with_context(|| path.display().to_string())
}

/// Has systemd check a unit whose program is the one just built: one that is not there is an error of its own.
fn verify(folder: &Path, name: &str, text: &str) -> anyhow::Result<Option<Output>> {
    let built = program("drover-agent").canonicalize()?;
    let built = built.parent().context("a program lies in a folder")?;
    let path: PathBuf = folder.join(name);
    fs::write(&path, text.replace(INSTALLED, &built.display().to_string()))?;
    let checked = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&path).output();
    match checked {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("left out: systemd-analyze is not installed (apt-get install systemd)");
            Ok(None)
        }
        checked => Ok(Some(checked?)),
    }
}

#[test]
fn and_a_mistake_in_one_is_seen() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    for name in ["drover-agent.service", "drover-coordinator.service"] {
        let text = unit(name)?;
        if let Some(checked) = verify(folder.path(), name, &text)? {
            let said = String::from_utf8_lossy(&checked.stderr).into_owned();
            ensure!(checked.status.success() && said.is_empty(), "{name}: {said}");
        }
        if let Some(checked) = verify(folder.path(), name, &text.replace("Type=exec", "Typ=exec"))? {
            ensure!(!checked.stderr.is_empty(), "{name}: a setting that systemd does not know passes");
        }
    }
    Ok(())
}

#[test]
fn and_the_agent_s_keeps_its_servers() -> anyhow::Result<()> {
    let agent = unit("drover-agent.service")?;
    for line in ["KillMode=process", "Delegate=yes"] {
        ensure!(agent.lines().any(|l| l == line), "{line} is not in the unit:\n{agent}");
    }
    Ok(())
}
