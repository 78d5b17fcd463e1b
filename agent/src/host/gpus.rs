//! GPU memory of the host's processes, as NVIDIA's driver counts it.
//!
//! Read through the driver's library (NVML), which is opened at run time: a host without it, or whose driver is being
//! replaced, answers "not known", and is asked again later. Must never: take "not known" for 0, or let a driver that
//! hangs hold up more than the one thread that asks it.

use nvml_wrapper::{Nvml, enums::device::UsedGpuMemory, error::NvmlError, struct_wrappers::device::ProcessInfo};
use std::{collections::BTreeMap, ffi::OsStr, sync::Arc, time::Duration};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};

/// Longest wait for the driver's answer; it takes a few milliseconds.
const PATIENCE: Duration = Duration::from_secs(1);
/// Pause before a library that could not be opened, or that has failed, is tried again.
const RETRY: Duration = Duration::from_secs(30);
/// The library as the driver installs it, and as its development package names it.
const LIBRARIES: [&str; 2] = ["libnvidia-ml.so.1", "libnvidia-ml.so"];

/// Bytes held on all devices together, by process id; `None` where the driver names a process but not what it holds.
pub type ByProcess = BTreeMap<u32, Option<u64>>;

/// What one device says of one process: its id, and the bytes that it holds there where the driver knows.
pub type Use = (u32, Option<u64>);

/// A source of what processes hold on GPUs.
pub trait Driver: Send + 'static {
    /// For each device what its processes hold. One that computes and draws is named twice.
    ///
    /// # Errors
    /// Says why nothing is known.
    fn uses(&mut self) -> Result<Vec<Vec<Use>>, String>;
}

/// Asks the driver. Cheap to clone.
#[derive(Clone)]
pub struct Gpus(Arc<Mutex<Box<dyn Driver>>>);

impl std::fmt::Debug for Gpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gpus")
    }
}

impl Default for Gpus {
    fn default() -> Self {
        Self::of(Nvidia::default())
    }
}

impl Gpus {
    /// Over this driver.
    #[must_use]
    pub fn of(driver: impl Driver) -> Self {
        Self(Arc::new(Mutex::new(Box::new(driver))))
    }

    /// What each process holds now; a process that is not named holds nothing. `None` when that is not known.
    pub async fn by_process(&self) -> Option<ByProcess> {
        // Whoever hangs in the driver keeps the lock: others wait for that, not in threads of their own.
        let mut driver = timeout(PATIENCE, self.0.clone().lock_owned()).await.ok()?;
        let asked = tokio::task::spawn_blocking(move || driver.uses());
        match timeout(PATIENCE, asked).await {
            Ok(Ok(Ok(devices))) => Some(sum(&devices)),
            Ok(Ok(Err(why))) => {
                tracing::debug!(why, "what processes hold on GPUs is not known");
                None
            }
            Ok(Err(error)) => {
                tracing::warn!(%error, "asking the GPUs' driver has failed");
                None
            }
            Err(_) => {
                tracing::warn!("the GPUs' driver does not answer: what processes hold there is not known");
                None
            }
        }
    }
}

/// What one process holds: 0 when the driver answers and does not name it.
#[must_use]
pub fn bytes_of(pid: i32, known: Option<&ByProcess>) -> Option<i64> {
    let held = known?.get(&u32::try_from(pid).ok()?).copied().unwrap_or(Some(0))?;
    Some(i64::try_from(held).unwrap_or(i64::MAX))
}

/// Over all devices. Where a device names a process twice, both times with all that it holds there, the larger counts.
fn sum(devices: &[Vec<Use>]) -> ByProcess {
    let mut all = ByProcess::new();
    for uses in devices {
        let mut here = ByProcess::new();
        for &(pid, bytes) in uses {
            let known = here.entry(pid).or_insert(bytes);
            *known = known.zip(bytes).map(|(a, b)| a.max(b));
        }
        for (pid, bytes) in here {
            let known = all.entry(pid).or_insert(Some(0));
            *known = known.zip(bytes).map(|(a, b)| a.saturating_add(b));
        }
    }
    all
}

/// NVIDIA's driver, where there is one.
#[derive(Debug, Default)]
struct Nvidia {
    library: Option<Nvml>,
    /// When it last failed.
    failed: Option<Instant>,
}

impl Driver for Nvidia {
    fn uses(&mut self) -> Result<Vec<Vec<Use>>, String> {
        if self.failed.is_some_and(|at| at.elapsed() < RETRY) {
            return Err("NVIDIA's library was not to be had a moment ago".to_owned());
        }
        let uses = self.read();
        if uses.is_err() {
            // A driver that was replaced or lost its device needs a library that is opened anew.
            (self.library, self.failed) = (None, Some(Instant::now()));
        }
        uses.map_err(|error| format!("NVIDIA's library: {error}"))
    }
}

impl Nvidia {
    fn read(&mut self) -> Result<Vec<Vec<Use>>, NvmlError> {
        let library = match self.library.take() {
            Some(library) => library,
            None => open()?,
        };
        let library = self.library.insert(library);
        (0..library.device_count()?)
            .map(|index| {
                let device = library.device_by_index(index)?;
                let mut uses = or_none(device.running_compute_processes())?;
                uses.extend(or_none(device.running_graphics_processes())?);
                Ok(uses.iter().map(of).collect())
            })
            .collect()
    }
}

fn open() -> Result<Nvml, NvmlError> {
    let mut opened = Err(NvmlError::LibraryNotFound);
    for name in LIBRARIES {
        opened = Nvml::builder().lib_path(OsStr::new(name)).init();
        if opened.is_ok() {
            break;
        }
    }
    opened
}

/// A device that can't do one of the two kinds of work has no processes that do it.
fn or_none(processes: Result<Vec<ProcessInfo>, NvmlError>) -> Result<Vec<ProcessInfo>, NvmlError> {
    match processes {
        Err(NvmlError::NotSupported) => Ok(Vec::new()),
        other => other,
    }
}

fn of(process: &ProcessInfo) -> Use {
    let bytes = match process.used_gpu_memory {
        UsedGpuMemory::Used(bytes) => Some(bytes),
        UsedGpuMemory::Unavailable => None,
    };
    (process.pid, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Given(Vec<Result<Vec<Vec<Use>>, String>>);

    impl Driver for Given {
        fn uses(&mut self) -> Result<Vec<Vec<Use>>, String> {
            self.0.remove(0)
        }
    }

    #[test]
    fn devices_add_up_and_a_process_named_twice_on_one_counts_once() {
        let all = sum(&[vec![(7, Some(10)), (8, Some(5)), (7, Some(12))], vec![(7, Some(100)), (9, None)], vec![]]);
        assert_eq!(all, ByProcess::from([(7, Some(112)), (8, Some(5)), (9, None)]));
        assert_eq!(bytes_of(7, Some(&all)), Some(112));
        assert_eq!(bytes_of(9, Some(&all)), None, "named, but the driver does not say how much");
        assert_eq!(bytes_of(1, Some(&all)), Some(0), "it holds nothing, which is known");
        assert_eq!((bytes_of(7, None), bytes_of(-1, Some(&all))), (None, None));
        let huge = sum(&[vec![(7, Some(u64::MAX))], vec![(7, Some(1))]]);
        assert_eq!(bytes_of(7, Some(&huge)), Some(i64::MAX));
    }

    #[tokio::test]
    async fn a_driver_that_is_lost_and_comes_back_is_known_unknown_known() {
        let gpus = Gpus::of(Given(vec![
            Ok(vec![vec![(7, Some(1))]]),
            Err("the driver is gone".to_owned()),
            Ok(vec![vec![(7, Some(2))]]),
        ]));
        assert_eq!(gpus.by_process().await, Some(ByProcess::from([(7, Some(1))])));
        assert_eq!(gpus.by_process().await, None);
        assert_eq!(gpus.by_process().await, Some(ByProcess::from([(7, Some(2))])));
    }

    #[tokio::test]
    async fn a_driver_that_hangs_holds_up_one_thread_and_panics_end_nothing() {
        struct Hangs(std::sync::mpsc::Receiver<()>, Arc<std::sync::atomic::AtomicUsize>);
        impl Driver for Hangs {
            fn uses(&mut self) -> Result<Vec<Vec<Use>>, String> {
                self.1.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                let _ = self.0.recv();
                panic!("as a library may");
            }
        }
        let (release, held) = std::sync::mpsc::sync_channel(1);
        let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let gpus = Gpus::of(Hangs(held, asked.clone()));
        assert_eq!(tokio::join!(gpus.by_process(), gpus.by_process()), (None, None));
        assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 1);
        release.send(()).unwrap();
        drop(release);
        assert_eq!(gpus.by_process().await, None);
    }

    #[test]
    fn a_host_without_the_library_is_asked_again_only_after_a_while() {
        let mut driver = Nvidia { library: None, failed: Some(Instant::now()) };
        assert!(driver.uses().unwrap_err().contains("a moment ago"));
    }
}
