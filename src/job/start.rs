//! What a job does at the instant at which it starts.
//!
//! ```text
//!          arm            commit             the machine comes by
//!  Idle ────────▶ Armed ──────────▶ Committed ──────────────────────▶ Taken
//!    ▲               │                 │
//!    └──── disarm ───┴─────────────────┘
//! ```
//!
//! 1. Arming happens while the guest is held, by a transaction or by the machine.
//! 2. What arming has done is undone by disarming, in full, and by nobody once the machine has it. The machine
//!    does not take what a transaction may still undo.

use std::fmt;

use parking_lot::Mutex;

use crate::bitmap::HBitmap;
use crate::node::{BitmapError, Locked, Node, QuiesceGuard, TrackError};
use crate::sabotage::{Sabotage, is_broken};

/// Who has begun a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begun {
    /// The caller, just now.
    Here,
    /// Somebody else, before.
    Before,
}

/// Why a job could not begin.
#[derive(Debug)]
pub(crate) enum StartError {
    /// Its bitmap cannot be had, or there is no memory.
    Bitmap(BitmapError),
    /// Guest writes cannot be recorded.
    Track(TrackError),
}

/// What a job must do while its guest is held, so that it has begun when the guest goes on. The job's own
/// machine sees to that, or the transaction that starts it.
pub(crate) trait AtStart: Send + Sync {
    /// The disk whose guest is held.
    fn node(&self) -> &Node;

    /// A map that [`arm`](Self::arm) may need, if there is memory for it.
    fn spare(&self) -> Option<HBitmap>;

    /// Does it. On error nothing has changed.
    fn arm(
        &self,
        locked: &mut Locked<'_>,
        guard: &QuiesceGuard,
        spare: Option<HBitmap>,
    ) -> Result<Begun, StartError>;

    /// Nothing that was done before is undone any more: the machine may go on with it.
    fn commit(&self);

    /// Undoes it, unless the machine has begun to work by then.
    fn disarm(&self, locked: &mut Locked<'_>);
}

/// What jobs of one kind do at that instant. All of it happens under the lock of the node's bitmaps.
pub(crate) trait Beginning: Send + Sync {
    /// What it takes, kept until then.
    type Idle: Send;
    /// What has begun.
    type Armed: Send;

    /// The disk whose guest is held.
    fn node(&self) -> &Node;

    /// The bitmap that is claimed, if one is.
    fn bitmap(&self) -> Option<&str>;

    /// Begins. `spare` may be taken for the successor of the claimed bitmap. On error nothing has changed.
    fn begin(
        &self,
        locked: &mut Locked<'_>,
        guard: &QuiesceGuard,
        spare: Option<HBitmap>,
        idle: Self::Idle,
    ) -> Result<Self::Armed, (StartError, Self::Idle)>;

    /// Undoes it, so that it can be begun again.
    fn undo(&self, locked: &mut Locked<'_>, armed: Self::Armed) -> Self::Idle;
}

/// A job of one kind on its way through that instant. See the module.
pub(crate) struct Start<B: Beginning> {
    beginning: B,
    state: Mutex<State<B>>,
}

enum State<B: Beginning> {
    Idle(B::Idle),
    Armed(B::Armed),
    Committed(B::Armed),
    Taken,
}

impl<B: Beginning> Start<B> {
    pub(crate) fn new(beginning: B, idle: B::Idle) -> Self {
        Self {
            beginning,
            state: Mutex::new(State::Idle(idle)),
        }
    }

    pub(crate) fn beginning(&self) -> &B {
        &self.beginning
    }

    /// What was begun with, if it was. Nobody undoes it any more.
    pub(crate) fn take(&self) -> Option<B::Armed> {
        let mut state = self.state.lock();
        match std::mem::replace(&mut *state, State::Taken) {
            State::Committed(armed) => Some(armed),
            State::Armed(armed) if is_broken(Sabotage::TakeUndecided) => Some(armed),
            other => {
                *state = other;
                None
            }
        }
    }

    /// As [`take`](Self::take), for a machine that is dropped: whoever would undo it finds nothing. What a
    /// transaction may still undo is undone: the job has not begun.
    pub(crate) fn take_at_drop(&self) -> Option<B::Armed> {
        let state = std::mem::replace(&mut *self.state.lock(), State::Taken);
        match state {
            State::Committed(armed) => Some(armed),
            State::Armed(armed) => {
                self.undo(armed);
                None
            }
            State::Idle(_) | State::Taken => None,
        }
    }

    /// Undoes what was taken, for good.
    pub(crate) fn undo(&self, armed: B::Armed) {
        let mut locked = Locked::new([self.beginning.node()]);
        let unused = self.beginning.undo(&mut locked, armed);
        drop(locked);
        drop(unused);
    }

    /// Whether a transaction has begun it that may still undo it.
    pub(crate) fn is_open(&self) -> bool {
        matches!(*self.state.lock(), State::Armed(_)) && !is_broken(Sabotage::TakeUndecided)
    }
}

impl<B: Beginning> AtStart for Start<B> {
    fn node(&self) -> &Node {
        self.beginning.node()
    }

    fn spare(&self) -> Option<HBitmap> {
        self.node().spare_for(self.beginning.bitmap()?)
    }

    fn arm(
        &self,
        locked: &mut Locked<'_>,
        guard: &QuiesceGuard,
        spare: Option<HBitmap>,
    ) -> Result<Begun, StartError> {
        let mut state = self.state.lock();
        let idle = match std::mem::replace(&mut *state, State::Taken) {
            State::Idle(idle) => idle,
            other => {
                // Somebody was faster, at an instant at which the guest was held as well.
                *state = other;
                return Ok(Begun::Before);
            }
        };
        match self.beginning.begin(locked, guard, spare, idle) {
            Ok(armed) => {
                *state = State::Armed(armed);
                Ok(Begun::Here)
            }
            Err((error, idle)) => {
                *state = State::Idle(idle);
                Err(error)
            }
        }
    }

    fn commit(&self) {
        let mut state = self.state.lock();
        *state = match std::mem::replace(&mut *state, State::Taken) {
            State::Armed(armed) => State::Committed(armed),
            other => other,
        };
    }

    fn disarm(&self, locked: &mut Locked<'_>) {
        if is_broken(Sabotage::KeepBegun) {
            return;
        }
        let mut state = self.state.lock();
        *state = match std::mem::replace(&mut *state, State::Taken) {
            State::Armed(armed) | State::Committed(armed) => {
                State::Idle(self.beginning.undo(locked, armed))
            }
            other => other,
        };
    }
}

impl<B: Beginning> fmt::Debug for Start<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Start").finish_non_exhaustive()
    }
}
