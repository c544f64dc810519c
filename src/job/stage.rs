//! How far one job has come at its end, seen by the others of its group.
//!
//! ```text
//!          it is near       all are       it is prepared       all are
//! None ─────────────▶ Near ───────▶ Closing ───────────▶ Prepared ─┬─────▶ Granted ─▶ Held ─┐ its caller
//!                                                                  │                        ▼ commits
//!                                                                  └──────────────────────▶ Voted ─▶ Committed
//!                                                                     without a switch            all have
//!
//! The round is over without a commit:
//! Closing, Prepared, Granted, Voted without a switch ─▶ None
//! Held ─▶ Stale ─── its caller drops it ─▶ None
//!           └────── its caller commits it ─┐
//! Voted ───────────────────────────────────┴─▶ Back ─── its guest is pointed back ─▶ None
//! ```
//!
//! A *round* is one try to bring all members to *committed*, from *closing* on. All of them are in it, or
//! none.

/// See the module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Not at its end.
    None,
    /// It could hold its guest now: it waits until all could.
    Near,
    /// All could: the guest is to be held.
    Closing,
    /// Everything that can fail is done, and nothing changes any more: it waits for the others.
    Prepared(Vote),
    /// All are prepared: its switch is to be handed out. From here on nothing stops it.
    Granted,
    /// The caller has the switch.
    Held,
    /// The caller has committed the switch, or there is none: it waits for the others.
    Voted,
    /// All have voted: it is over with success.
    Committed,
    /// The caller has the switch still, but the round is over.
    Stale,
    /// It has voted, and the round is over: the guest is to be pointed back, and nothing goes on before.
    Back,
}

/// How a member votes for the commit of its group, once all are prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    /// By its caller, who is handed the switch.
    BySwitch,
    /// At once: it has no switch.
    AtOnce,
}

impl Stage {
    /// Whether the job can no longer be kept from its end, but by a switch that is dropped.
    pub(super) fn is_decided(self) -> bool {
        match self {
            Stage::Granted | Stage::Held | Stage::Voted | Stage::Committed => true,
            Stage::None
            | Stage::Near
            | Stage::Closing
            | Stage::Prepared(_)
            | Stage::Stale
            | Stage::Back => false,
        }
    }

    /// Whether the machine may hold its guest for the end of the job.
    pub(crate) fn may_hold(self) -> bool {
        match self {
            Stage::Closing | Stage::Prepared(_) | Stage::Granted | Stage::Voted => true,
            Stage::None
            | Stage::Near
            | Stage::Held
            | Stage::Committed
            | Stage::Stale
            | Stage::Back => false,
        }
    }

    /// What becomes of it when the round is over without a commit. `has_switched`: its caller has
    /// committed the switch.
    pub(super) fn after_round(self, has_switched: bool) -> Self {
        match self {
            Stage::Closing | Stage::Prepared(_) | Stage::Granted => Stage::None,
            Stage::Voted if has_switched => Stage::Back,
            Stage::Voted => Stage::None,
            Stage::Held => Stage::Stale,
            Stage::None | Stage::Near | Stage::Committed | Stage::Stale | Stage::Back => self,
        }
    }

    /// What becomes of it when the job is cancelled by force.
    pub(super) fn after_cancel(self) -> Self {
        match self {
            Stage::Near => Stage::None,
            stage => stage.after_round(false),
        }
    }
}
