//! Time, chance and tasks: where a program meets them, so that a simulation can stand in for all three.
//!
//! In a release build these are plain calls. In a debug build a thread may have entered a simulated world
//! ([`simulated::enter`]): then time, random numbers and the turns of tasks are its own, and each is asked for in the name of
//! one life of one program. Whoever starts a task hands it to tokio through [`task`]; who reads a wall clock, CLOCK_BOOTTIME
//! or chance does so here, in the programs' clock modules or where an id is made. Must never: decide anything.

use std::time::SystemTime;

/// The wall clock. Called by the programs' clock modules alone.
#[must_use]
pub fn wall() -> SystemTime {
    #[cfg(debug_assertions)]
    if let Some(ms) = simulated::ask(|world, process| world.wall_ms(process)) {
        return SystemTime::UNIX_EPOCH + std::time::Duration::from_millis(u64::try_from(ms).unwrap_or(0));
    }
    #[allow(clippy::disallowed_methods, reason = "what the clock modules of the programs read")]
    SystemTime::now()
}

/// Nanoseconds since boot: of the simulated host, or what `real` reads.
pub fn boottime_ns(real: fn() -> u64) -> u64 {
    #[cfg(debug_assertions)]
    if let Some(ns) = simulated::ask(|world, process| world.boottime_ns(process)) {
        return ns;
    }
    real()
}

/// A random number.
#[must_use]
pub fn random_u64() -> u64 {
    #[cfg(debug_assertions)]
    if let Some(number) = simulated::ask(|world, process| world.random(process)) {
        return number;
    }
    #[allow(clippy::disallowed_methods, reason = "this is where chance enters")]
    rand::random()
}

/// A random number, as a nonce.
#[must_use]
pub fn random_u128() -> u128 {
    u128::from(random_u64()) << 64 | u128::from(random_u64())
}

/// A random share: at least 0, below 1.
#[must_use]
pub fn random_share() -> f64 {
    // The 53 bits that the number has room for.
    (random_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

/// A random id (UUID, version 4).
#[must_use]
pub fn uuid() -> String {
    uuid::Builder::from_random_bytes(random_u128().to_be_bytes()).into_uuid().to_string()
}

/// A task of this program: what is given to `tokio::spawn` and to a `JoinSet`. In a release build the future itself.
#[cfg(not(debug_assertions))]
pub fn task<F: Future>(future: F) -> F {
    future
}

#[cfg(debug_assertions)]
pub use simulated::task;

/// What a simulation puts in the place of clocks, chance and the scheduler. Debug builds only.
#[cfg(debug_assertions)]
pub mod simulated {
    use std::{
        cell::{Cell, RefCell},
        fmt,
        panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
        pin::Pin,
        rc::Rc,
        task::{Context, Poll, Waker},
    };

    /// One life of a program; a thread that may be paused for itself is one of its own.
    pub type Process = u32;

    /// What becomes of a task that asks to be polled.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Turn {
        /// It is.
        Run,
        /// It is not now: the world wakes it when it may.
        Later,
        /// Its process is dead: it is dropped where it is, as by kill -9.
        Never,
    }

    /// A world.
    pub trait World {
        /// Milliseconds since the epoch, by this process's wall clock.
        fn wall_ms(&self, of: Process) -> i64;
        /// Nanoseconds since the boot of this process's host.
        fn boottime_ns(&self, of: Process) -> u64;
        /// A random number out of the process's own stream: one draw more in one process changes no other.
        fn random(&self, of: Process) -> u64;
        /// A task wants to be polled.
        fn turn(&self, of: Process, task: u64, waker: &Waker) -> Turn;
        /// A task is gone.
        fn gone(&self, of: Process, task: u64);
        /// A task has panicked: by itself nothing follows from that.
        fn panicked(&self, of: Process, what: &str);
    }

    thread_local! {
        static WORLD: RefCell<Option<Rc<dyn World>>> = const { RefCell::new(None) };
        static CURRENT: Cell<Option<Process>> = const { Cell::new(None) };
        static TASKS: Cell<u64> = const { Cell::new(0) };
    }

    /// While it lives, this thread is in the world.
    #[derive(Debug)]
    pub struct Entered(());

    impl Drop for Entered {
        fn drop(&mut self) {
            WORLD.with(|world| world.borrow_mut().take());
        }
    }

    /// Enters a world; one a thread at a time.
    #[must_use]
    pub fn enter(world: Rc<dyn World>) -> Entered {
        WORLD.with(|place| place.borrow_mut().replace(world));
        TASKS.set(0);
        Entered(())
    }

    /// Does something in the name of a process: the tasks that it starts are that process's.
    pub fn as_process<T>(process: Process, work: impl FnOnce() -> T) -> T {
        let _back = Back(CURRENT.replace(Some(process)));
        work()
    }

    /// The process in whose name this thread works now.
    #[must_use]
    pub fn current() -> Option<Process> {
        CURRENT.get()
    }

    pub(super) fn ask<T>(question: impl FnOnce(&dyn World, Process) -> T) -> Option<T> {
        let process = CURRENT.get()?;
        let world = WORLD.with(|world| world.borrow().clone())?;
        Some(question(&*world, process))
    }

    struct Back(Option<Process>);

    impl Drop for Back {
        fn drop(&mut self) {
            CURRENT.set(self.0);
        }
    }

    /// A task of a process; a plain future where there is none.
    pub struct Task<F> {
        inner: Option<Pin<Box<F>>>,
        process: Option<Process>,
        id: u64,
    }

    impl<F> fmt::Debug for Task<F> {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("Task").field("process", &self.process).field("id", &self.id).finish_non_exhaustive()
        }
    }

    /// See the parent module.
    pub fn task<F: Future>(future: F) -> Task<F> {
        let id = TASKS.get();
        TASKS.set(id + 1);
        Task { inner: Some(Box::pin(future)), process: CURRENT.get(), id }
    }

    impl<F: Future> Future for Task<F> {
        type Output = F::Output;

        fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
            let Some(process) = self.process else {
                return self.inner.as_mut().map_or(Poll::Pending, |inner| inner.as_mut().poll(cx));
            };
            let _back = Back(CURRENT.replace(Some(process)));
            let id = self.id;
            match ask(|world, process| world.turn(process, id, cx.waker())).unwrap_or(Turn::Run) {
                Turn::Later => return Poll::Pending,
                Turn::Never => {
                    self.inner = None;
                    return Poll::Pending;
                }
                Turn::Run => {}
            }
            let Some(inner) = self.inner.as_mut() else { return Poll::Pending };
            match catch_unwind(AssertUnwindSafe(|| inner.as_mut().poll(cx))) {
                Ok(polled) => polled,
                Err(panic) => {
                    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
                    let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
                    let _ = ask(|world, process| world.panicked(process, &text));
                    resume_unwind(panic)
                }
            }
        }
    }

    impl<F> Drop for Task<F> {
        fn drop(&mut self) {
            let Some(process) = self.process else { return };
            let _back = Back(CURRENT.replace(Some(process)));
            self.inner = None;
            let id = self.id;
            let _ = ask(|world, process| world.gone(process, id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outside_of_a_simulation_time_and_chance_are_real() {
        assert!(wall() > SystemTime::UNIX_EPOCH);
        assert_eq!(boottime_ns(|| 7), 7);
        assert_ne!(random_u128(), random_u128());
        assert!((0.0..1.0).contains(&random_share()));
        assert_eq!(uuid().len(), 36);
    }

    #[cfg(debug_assertions)]
    mod in_a_world {
        use super::super::{simulated::*, *};
        use std::{
            cell::{Cell, RefCell},
            collections::BTreeMap,
            rc::Rc,
            task::Waker,
            time::Duration,
        };

        #[derive(Default)]
        struct One {
            turn: Cell<Option<Turn>>,
            wakers: RefCell<BTreeMap<u64, Waker>>,
        }

        impl World for One {
            fn wall_ms(&self, of: Process) -> i64 {
                i64::from(of) * 1000
            }
            fn boottime_ns(&self, of: Process) -> u64 {
                u64::from(of)
            }
            fn random(&self, of: Process) -> u64 {
                u64::from(of)
            }
            fn turn(&self, _: Process, task: u64, waker: &Waker) -> Turn {
                self.wakers.borrow_mut().insert(task, waker.clone());
                self.turn.get().unwrap_or(Turn::Run)
            }
            fn gone(&self, _: Process, task: u64) {
                self.wakers.borrow_mut().remove(&task);
            }
            fn panicked(&self, _: Process, _: &str) {}
        }

        impl One {
            fn now(&self, turn: Turn) {
                self.turn.set(Some(turn));
                self.wakers.borrow().values().for_each(Waker::wake_by_ref);
            }
        }

        #[tokio::test(start_paused = true)]
        async fn a_process_has_its_own_time_and_a_dead_one_is_dropped_where_it_is() {
            let world = Rc::new(One::default());
            let _entered = enter(world.clone());
            let (told, mut heard) = tokio::sync::mpsc::channel(8);
            let work = async move {
                // A task that a task starts is the same process's.
                let _ = tokio::spawn(task(async move {
                    loop {
                        let _ = told.send((wall(), boottime_ns(|| 0))).await;
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                }))
                .await;
            };
            as_process(3, || tokio::spawn(task(work)));
            let (at, boot) = heard.recv().await.unwrap();
            assert_eq!((at, boot), (SystemTime::UNIX_EPOCH + Duration::from_secs(3), 3));
            world.now(Turn::Later);
            let paused = tokio::time::timeout(Duration::from_secs(10), heard.recv()).await;
            assert!(paused.is_err(), "{paused:?}");
            world.now(Turn::Run);
            assert!(heard.recv().await.is_some());
            world.now(Turn::Never);
            assert_eq!(heard.recv().await, None, "its end of the queue went with it");
        }
    }
}
