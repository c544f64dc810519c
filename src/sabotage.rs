//! Breaks an invariant on purpose, so that tests can show that they would notice.
//!
//! Exists in builds with debug assertions only; in others nothing can be broken. The switch is that of
//! the current thread.

/// The invariant to break. The names say what goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Copy machinery 1: dirty bits are cleared when a range has been copied.
    ClearAfterCopy,
    /// Copy machinery 2: dirty bits are cleared after the source was asked what it holds.
    ClearAfterLook,
    /// Copy machinery 3: what is in flight is not looked at before a claim.
    ClaimTwice,
    /// Copy machinery 4: a range is compared with the claims before it is widened.
    WidenAfterCheck,
    /// Copy machinery 5: what failed stays clean.
    ForgetFailed,
    /// Copy machinery 6: a lost range is free again before the target has settled.
    DoNotSettle,
    /// Copy machinery 6: a settling that was asked for before covers what is lost after that.
    SettledBefore,
    /// Copy machinery 7: what was planned is forgotten when the job gives up.
    ForgetPlanned,
    /// Copy machinery 8: a clean bitmap is taken for equal disks.
    TrustCleanBitmap,
    /// Zeroes 1: what was known to read as zeroes is so for ever.
    KeepZeroes,
    /// Zeroes 1: a write that fails, or is lost, leaves what was zero so.
    KeepZeroesOfFailed,
    /// Zeroes 1: what active writes write to the target leaves what was zero so.
    IgnoreActiveWrites,
    /// Zeroes 2: what is about to be zeroed reads so already.
    TrustZeroesAtOnce,
    /// Zeroes 4: a part of a cluster is left, and what is written beside it fills it.
    LeaveParts,
    /// Doubts 1: what could not be compared is taken for equal.
    ForgetDoubt,
    /// Doubts 2: what a guest write has changed meanwhile is told to differ.
    TellRaces,
    /// Doubts 3: what differs is told and not copied.
    TellOnly,
    /// Doubts 4: what is dirty and doubtful is copied by what was known of the target before.
    TrustDoubtful,
    /// Doubts 4: what an active write has changed is suspected on.
    KeepSuspicion,
    /// Mirror 12: ready is told while something is doubtful.
    ReadyInDoubt,
    /// Copy machinery 9: what was written in part, and is not in the top layer, is left so.
    SkipTorn,
    /// Copy machinery 10: what a guest waits for is kept back by the limits of the rest.
    LimitUrgent,
    /// Backup 1: writes are let through before what is to be copied is complete.
    HoldBeforeContent,
    /// Backup 2: a guest write goes on when its clusters are in flight, not when they are on the target.
    ReleaseInFlight,
    /// Backup 3: a failed copy lets the guest overwrite what was not saved, and nobody is told.
    ReleaseFailed,
    /// Backup 4 and mirror 7: a bitmap with mode on-success is clean after a failure.
    CleanAfterFailure,
    /// Backup 4 and mirror 7: a bitmap with mode always forgets what is in flight at the end.
    ForgetInFlight,
    /// Backup 4: what was never flushed is taken for copied after a failure.
    TrustUnflushed,
    /// Backup 5: the job ends without a flush.
    EndWithoutFlush,
    /// Backup 6: guest writes go on while the job is paused.
    LetGoWhilePaused,
    /// View 1: guests overwrite what is being read.
    ReleaseWhileRead,
    /// View 2: what was read while the view ended is used.
    TrustBrokenView,
    /// Buffer 1: what was put in counts as saved, whether it is still wanted or not.
    SaveUnwanted,
    /// Buffer 2: what is saved is copied from the source.
    CopyOverwritten,
    /// Buffer 3: what was saved while it was copied is taken for copied.
    TrustOvertaken,
    /// Buffer 5: what was lost on its way to the buffer is not waited for.
    DoNotSettleBuffer,
    /// Mirror 7: what was written before the bitmap was claimed stays out of what is copied.
    ForgetClaimed,
    /// Mirror 7: a bitmap keeps what was written while a job ran that has succeeded.
    KeepWritesOfJob,
    /// Mirror 7: what was written since the instant of the end is taken for copied.
    InstantAtEnd,
    /// Mirror 9: writes are active ones while the source is scanned.
    ActiveWhileScanning,
    /// Mirror 9: what active writes have brought to the target counts as flushed.
    ForgetActiveWrites,
    /// Mirror 9: what active writes have under way is left out of what is left.
    LeaveOutActives,
    /// Mirror 10: the target counts as synced while other writes are under way.
    TrustTheMode,
    /// Mirror 11: a commit writes where the base shows, too.
    CommitBelow,
    /// Mirror 8: a checkpoint leaves out what is in flight.
    CheckpointForgetsClaims,
    /// Mirror 8: a checkpoint of other disks is gone on from.
    ResumeAnyDisk,
    /// Mirror 8: an older checkpoint is gone on from.
    ResumeAnyGeneration,
    /// Mirror 1: recording starts without waiting for guest writes in flight.
    AttachWithoutQuiesce,
    /// Mirror 2: copying starts before the scan is over.
    CopyWhileScanning,
    /// Mirror 3: ready is told without a flush.
    ReadyWithoutFlush,
    /// Mirror 4: what is left is not looked at again once the guest is held.
    SwitchWithoutRecheck,
    /// Mirror 4: the switch is handed out without a flush.
    SwitchWithoutFlush,
    /// Mirror 5: copying goes on after the switch.
    CopyAfterSwitch,
    /// Group 1: a switch that was committed takes effect at once, whatever becomes of the others.
    CommitAlone,
    /// Group 2: a member that fails lets the others go on.
    OthersGoOn,
    /// Group 2: a member that was never started waits for somebody to drive it.
    LeaveCreated,
    /// Group 3: a member is pending while others still work.
    PendingAlone,
    /// Group 3: a group is finalized although a member wants to be told.
    FinalizeUntold,
    /// Group 4: a guest is held before all members could hold theirs.
    HoldAlone,
    /// Group 4: a switch is handed out while others are not prepared.
    SwitchAlone,
    /// Group 5: a guest goes on before all have voted.
    ReleaseEarly,
    /// Group 6: a guest is held on when another was let go.
    KeepHolding,
    /// Group 6: a machine lets its guest go before it has said so.
    LetGoSilently,
    /// Group 7: a job joins a group that has begun to end.
    JoinLate,
    /// Group 8: what cannot be asked of one member is asked of the others all the same.
    AskOneByOne,
    /// Manager 1: a name is given to two jobs.
    NameTwice,
    /// Manager 2: jobs without a name are told of.
    TellInternal,
    /// Manager 3: a shutdown cancels nobody.
    ShutDownNobody,
    /// Manager 3: a job is made during the shutdown.
    MakeInShutdown,
    /// Manager 4: jobs outlive their manager.
    OutliveManager,
    /// Node 1: a write is recorded when it begins.
    RecordAtBegin,
    /// Node 1: a ticket that is dropped records nothing.
    ForgetDropped,
    /// Node 3: the log has the granularity of the newest bitmap, not of the finest.
    LogAsNewest,
    /// Node 4: the log is drained into the first bitmap that records, and not into the others.
    DrainIntoFirst,
    /// Bitmaps 2: a name is given to two bitmaps of a disk.
    SameNameTwice,
    /// Bitmaps 3: guest writes are recorded on when no bitmap records any more.
    RecordOn,
    /// Bitmaps 5: that a bitmap is read-only is told before that it is in use.
    ReadonlyFirst,
    /// Bitmaps 5: a merge checks each source when its turn comes.
    MergeOneByOne,
    /// Bitmaps 1: a verb looks at the bitmaps before what was recorded has come there.
    VerbWithoutDrain,
    /// Bitmaps 4: what is frozen is not kept from being changed.
    FreezeWithoutHolding,
    /// Bitmaps 6: a claim ends without its successor's recording.
    EndDisabled,
    /// Bitmaps 6: a successor that takes the bitmap's place does not take its flags.
    AbdicateForgetsFlags,
    /// Bitmaps 6: what was recorded while a bitmap was claimed is lost when it is reclaimed.
    ReclaimForgetsSuccessor,
    /// Bitmaps 7: writes are let in although a bitmap is read-only.
    LetInReadonly,
    /// Bitmaps 8: nodes are locked in the order in which they are named.
    LockAsNamed,
    /// Growing log 1: it does not grow with the disk.
    LogStaysShort,
    /// Resize 1: bitmaps that somebody has, and read-only ones, are resized, too.
    ResizeInUse,
    /// Resize 2: what is new is clean.
    GrowClean,
    /// Arrivals 1: a bitmap whose bits are not here is free.
    ArriveIdle,
    /// Arrivals 1: a bitmap whose bits did not come stays.
    KeepPartial,
    /// Arrivals 2: the guest starts, and its writes are not recorded.
    StartUnrecorded,
    /// Arrivals 2: what was written here is lost when the bits come.
    DeliverOverWrites,
    /// Loader 3: a bitmap is taken for whole although parts did not come.
    CompleteWithGaps,
    /// Loader 2: zeroes that come do not replace what came before.
    AddLoaded,
    /// Loader 4 and migration 7: what a receiver allows is not looked at before memory is taken.
    IgnoreLimits,
    /// Migration 7: a bitmap that begins takes the place of one of this host.
    ReplaceLocal,
    /// Migration 5: whether a chunk has changed is cleared after it was read.
    ClearAfterRead,
    /// Records 1: as many bytes are waited for as a record says.
    TrustLength,
    /// Records 2: a name that was cut is taken for whole.
    TakeCutNames,
    /// Reader 1: an error is said to be where it is in the piece that was fed.
    ForgetPlace,
    /// Reader 2: as much is kept as whoever knows another section asks for.
    KeepAll,
    /// Frames 1: a frame that is missing or comes again is not noticed.
    IgnoreNumbers,
    /// Frames 2: as many bytes are waited for as a frame says.
    TrustFrameLength,
    /// Migration 4: bitmaps are taken one by one, and kept when one is refused.
    HoldBeforeCheck,
    /// Migration 3: what was not handed over is left out of exports.
    CancelHandsOver,
    /// Migration 6: writes are not looked for while the guest is to stand still.
    IgnoreWrites,
    /// Migration 8: what was on its way when the connection broke is not sent again.
    ForgetUnconfirmed,
    /// Transactions 1: the guests go on before it is decided.
    LetGoBeforeCommit,
    /// Transactions 2: what comes after an act that fails is tried all the same.
    GoOnAfterFailure,
    /// Transactions 3: what was done before an act that fails is kept.
    KeepHalf,
    /// Transactions 3: undoing goes from the first to the last.
    RollBackForward,
    /// Transactions 3: undoing goes back to the log of before, whoever records meanwhile.
    RollBackLog,
    /// Transactions 4: a bitmap goes before it is decided.
    RemoveAtOnce,
    /// Start 2: what a job has begun stays begun when the list is undone.
    KeepBegun,
    /// Start 2: a machine takes what a transaction may still undo.
    TakeUndecided,
    /// Transactions 5: others may have what was touched.
    DoNotHold,
    /// Transactions 5: a name that may have to be given back is given to others.
    GiveAwayName,
    /// Active writes 1: a write does not look for what the job has claimed.
    WriteOverClaims,
    /// Active writes 1: the job does not look for active writes.
    ClaimOverWrites,
    /// Active writes 1: a write does not look for others.
    OverlapActives,
    /// Active writes 2: writes that come later overtake one that waits, however many have.
    OvertakeForEver,
    /// Active writes 1: the claim of a write ends when the source has it.
    EndClaimEarly,
    /// Active writes 2: the job wishes for nothing that writes keep from it.
    WishForNothing,
    /// Active writes 3: a granule that a write covers in part is clean thereafter.
    WriteIntoDirty,
    /// Active writes 4: a write that has failed on the source is not recorded.
    ForgetFailedSource,
    /// Active writes 4: a write that has failed on the target is not recorded.
    ForgetFailedTarget,
    /// Active writes 5: one that has gone well is recorded nowhere.
    RecordNoActives,
    /// Active writes 7: those that wait go on waiting when nobody drives the job.
    WaitForNobody,
    /// Active writes 8: a write makes clean what a usual one beside it has made dirty.
    CleanBesideOthers,
    /// Crew 1: who is about to wait does not hear that the bell has rung.
    DoNotHearBell,
    /// Crew 2: who leaves does not ring the bell.
    LeaveInSilence,
    /// Crew 2: who only saves does not ring the bell, whatever it has found in place of others.
    SaveInSilence,
    /// Crew 3: what a member had in flight when it left is on its way for ever.
    ForgetLostWork,
    /// Crew 3: the same, but only of what the member had not begun with.
    ForgetUnbegun,
    /// Gate 2: the gate is taken for quiet while writes are inside.
    DoNotWaitForWriters,
    /// Hold 4: writes wait for a job that is gone.
    HoldForEver,
    /// Hold 5: a hold that has ended lets go of what the next one holds back.
    LetGoLate,
    /// Bitmap 5: a reset that cuts a granule clears all of it.
    RoundReset,
    /// Bitmap 6: a range that ends past the map is refused, and what of it is in the map is set.
    SetAndRefuse,
    /// Bitmap 7: queries go on to the end of the last granule, which may be past the end.
    AskPastEnd,
    /// Bitmap 8: a cursor that has ended goes on when something is set ahead of where it was.
    ForgetEnd,
    /// Bitmap 9: a granule is taken away although the other map has only a part of it.
    SubtractParts,
    /// Bitmap 10: what is filled far and wide is written.
    WriteFull,
    /// Bitmap 11: a map may have any number of granules.
    ForgetMost,
    /// Bitmap 12: a map takes its memory when it is made.
    TakeMemoryAtOnce,
    /// Stored bitmap 2: the CRCs of records are not looked at.
    IgnoreCrc,
    /// Stored bitmap 2: dirty granules are not counted.
    IgnoreCount,
    /// Stored bitmap 3: memory is asked for as the header says.
    TrustHeader,
    /// Stored bitmap 4: a bitmap in use is taken all the same.
    TrustInUse,
    /// Tracked bitmap 1: what gets clean is not marked.
    ForgetReset,
    /// Tracked bitmap 1: what is merged or loaded is not marked.
    ForgetMerged,
    /// Tracked bitmap 3: what is new after growing is not marked.
    ForgetTruncated,
    /// Tracked bitmap 1: what a guest writes is not marked.
    ForgetRecorded,
    /// Words 2: bits past the last granule are kept.
    KeepPadding,
    /// Words 3: what is put in is not counted.
    ForgetCount,
    /// Words 1: a word that is full but 0 is taken for what it says.
    ForgetFullWords,
}

#[cfg(debug_assertions)]
thread_local! {
    static BROKEN: std::cell::Cell<Option<Sabotage>> = const { std::cell::Cell::new(None) };
}

/// Breaks that invariant, and mends the one broken before, on this thread.
#[cfg(debug_assertions)]
pub fn break_on_this_thread(sabotage: Option<Sabotage>) {
    BROKEN.set(sabotage);
}

#[inline]
pub(crate) fn is_broken(sabotage: Sabotage) -> bool {
    #[cfg(debug_assertions)]
    {
        BROKEN.get() == Some(sabotage)
    }
    #[cfg(not(debug_assertions))]
    {
        let _ = sabotage;
        false
    }
}
