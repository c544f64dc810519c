//! A guest that saves what it is about to overwrite, on its own thread.
//!
//! It never drives the job. It was not woken for those who do, so it looks in their place before it leaves or waits,
//! and rings only if it has found something: to wake another thread costs more than to save a small cluster.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use super::bell::Quiet;
use super::crew::{Crew, Member};
use super::{Clock, Driver, SaveArea};
use crate::backup::Backup;
use crate::copy::Op;
use crate::io::{BufferPool, ReadAt, WriteAt};
use crate::machine::Machine;
use crate::sabotage::{Sabotage, is_broken};

impl<S, T, P, C, B> Crew<'_, Backup, Driver<S, T, P, C, B>>
where
    S: ReadAt,
    T: WriteAt<Buf = S::Buf>,
    P: BufferPool<Buf = S::Buf>,
    C: Clock,
    B: SaveArea<S::Buf>,
{
    /// Waits for a guest write to be let through, and copies here what it waits for.
    ///
    /// So a guest whose thread can block does not wait for another thread to be woken, and that for it. Somebody
    /// must drive the job all the same: deadlines, and all else, are seen to there. What this task is at is not
    /// left at the deadline, if the device does its work when it is polled.
    ///
    /// `write` is [`Node::begin_write`](crate::Node::begin_write) awaited, or any other future.
    ///
    /// # Cancel safety
    ///
    /// That of `write`, and of [`run`](Self::run).
    pub async fn save_for<F: Future>(&self, write: F) -> F::Output {
        let mut write = pin!(write);
        let mut saver = Saver::of(self);
        if let Some(output) = once(|cx| saver.poll(write.as_mut(), cx)).await {
            return output;
        }
        saver.join();
        let mut urgent = FuturesUnordered::new();
        let mut output = None;
        poll_fn(|cx| {
            loop {
                if output.is_none()
                    && let Poll::Ready(ready) = saver.poll(write.as_mut(), cx)
                {
                    output = Some(ready);
                }
                if let Poll::Ready(Some(())) = urgent.poll_next_unpin(cx) {
                    saver.has_done_something = true;
                    continue;
                }
                // What others wait for is brought to its end, too.
                match output.take_if(|_| urgent.is_empty()) {
                    Some(output) => return Poll::Ready(output),
                    None if output.is_some() => {}
                    None => {
                        if let Some(op) = self.look_for_guests() {
                            urgent.push(self.work_on(op));
                            continue;
                        }
                    }
                }
                saver.has_to_wait();
                return Poll::Pending;
            }
        })
        .await
    }

    fn look_for_guests(&self) -> Option<Op> {
        let now = self.driver.clock.now();
        let mut state = self.state.lock();
        let now = state.see(now);
        state.machine.poll_urgent(now, &self.waker)
    }
}

/// Polls once.
async fn once<T>(mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Option<T> {
    poll_fn(|cx| match poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

/// Who waits for a guest write, and saves what that is about to overwrite. It rings only if it must: that costs
/// more than to save a small cluster.
struct Saver<'c, 'a, M: Machine, D> {
    crew: &'c Crew<'a, M, D>,
    member: Option<Member<'c, 'a, M, D>>,
    /// Whether the bell was to be rung here, and was not.
    has_kept_quiet: bool,
    /// Whether others may go on with what was done here, and have not heard of it.
    has_done_something: bool,
}

impl<'c, 'a, M: Machine, D> Saver<'c, 'a, M, D> {
    fn of(crew: &'c Crew<'a, M, D>) -> Self {
        Self {
            crew,
            member: None,
            has_kept_quiet: false,
            has_done_something: false,
        }
    }

    /// Whatever rings here meanwhile is kept to itself: it is this write that comes.
    fn poll<F: Future>(&mut self, write: Pin<&mut F>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let _quiet = Quiet::of(&self.crew.bell, &mut self.has_kept_quiet);
        write.poll(cx)
    }

    fn join(&mut self) {
        self.member = Some(Member::join(self.crew, true));
    }

    /// Others must know how long the write may wait, and what was done.
    fn has_to_wait(&mut self) {
        let has_kept_quiet = std::mem::take(&mut self.has_kept_quiet);
        let has_done_something = std::mem::take(&mut self.has_done_something);
        if has_kept_quiet || (has_done_something && self.finds_something()) {
            self.crew.bell.ring();
        }
    }

    /// It looks in place of those it would wake.
    fn finds_something(&self) -> bool {
        let is_found = self.crew.state.lock().finds_something(&self.crew.waker);
        is_found && !is_broken(Sabotage::SaveInSilence)
    }
}

impl<M: Machine, D> Drop for Saver<'_, '_, M, D> {
    fn drop(&mut self) {
        let Some(member) = self.member.take() else {
            return self.has_to_wait();
        };
        if self.finds_something() {
            self.crew.bell.ring();
        }
        drop(member);
    }
}
