//! The destination of a migration: bytes go in, bitmaps come to the nodes.

use std::fmt;

use super::error::{Fault, GuestStartError, IncomingError, StreamError};
use super::event::{IncomingBitmap, IncomingEvent};
use super::loader::{Allowed, Begins, Bits, Loader, Refusal};
use super::wire::SECTOR;
use super::wire::native::{self, Form, FrameBody, Session, StartFrame};
use super::wire::qemu::{Record, RecordBody};
use super::wire::reader::RecordReader;
use super::wire::sections::{ForeignSections, Framing};
use super::{BitmapMigration, MigratingNode, StreamKind};
use crate::node::QuiesceGuard;
use crate::sabotage::{Sabotage, is_broken};
use crate::units::ByteRange;

/// What a destination expects and allows.
#[non_exhaustive]
pub struct IncomingOptions {
    /// Which stream comes. Default QEMU's, [`Bare`](Framing::Bare).
    pub stream: StreamKind,
    /// Whether parts of sections end with a footer. Default yes.
    pub footers: bool,
    /// Who knows sections that are not about bitmaps. Default nobody.
    pub foreign: Option<Box<dyn ForeignSections + Send>>,
    /// How many bitmaps may come. Default 4096: what each costs grows with their number.
    pub bitmaps_max: usize,
    /// How many bytes their bits may have in all, which is about a third of the memory that they take while
    /// they come. Default 4 GiB.
    pub bytes_max: u64,
}

impl Default for IncomingOptions {
    fn default() -> Self {
        Self {
            stream: StreamKind::Qemu(Framing::Bare),
            footers: true,
            foreign: None,
            bitmaps_max: 1 << 12,
            bytes_max: 4 << 30,
        }
    }
}

impl fmt::Debug for IncomingOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IncomingOptions")
            .field("stream", &self.stream)
            .field("footers", &self.footers)
            .field("bitmaps_max", &self.bitmaps_max)
            .field("bytes_max", &self.bytes_max)
            .finish_non_exhaustive()
    }
}

/// The destination of a migration of dirty bitmaps, in either stream.
///
/// Made by [`BitmapMigration::incoming`]. Bytes are [fed](Self::feed) as they come; when the guest is about to
/// run, [`guest_starts`](Self::guest_starts) is told, be it before all bits came or after. A bitmap becomes
/// the node's when both are so. Until then its name is in use, and dropping this removes it.
///
/// # Examples
///
/// ```
/// use blockjob::migration::{IncomingOptions, OutgoingOptions, Next};
/// use blockjob::{BitmapMigration, BitmapOptions, Node};
/// use std::time::Duration;
///
/// let (here, there) = (Node::new(1 << 30), Node::new(1 << 30));
/// let quiesced = here.quiesce().try_guard().expect("no write is in flight");
/// here.bitmaps().add(&quiesced, "daily", BitmapOptions::default())?;
/// drop(quiesced);
/// here.begin_write((0..1).into()).go().expect("nobody quiesces it").finish(());
///
/// let mut outgoing = BitmapMigration::new().with_node("disk0", &here).outgoing(OutgoingOptions::default())?;
/// let mut incoming = BitmapMigration::new().with_node("disk0", &there).incoming(IncomingOptions::default());
/// let stopped = here.quiesce().try_guard().expect("no write is in flight");
/// outgoing.stop(&[&stopped])?;
/// let mut bytes = [0; 100];
/// while let Next::Bytes(len) = outgoing.next_bytes(Duration::ZERO, &mut bytes)? {
///     incoming.feed(&bytes[..len])?;
/// }
/// incoming.finish()?;
/// let quiesced = there.quiesce().try_guard().expect("no write is in flight");
/// incoming.guest_starts(&[&quiesced])?;
/// outgoing.finish()?;
/// assert_eq!(there.bitmaps().query("daily")?.dirty_bytes, 65536);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "what has not arrived is gone when this is dropped"]
pub struct IncomingMigration {
    loader: Loader,
    input: Input,
}

enum Input {
    Qemu {
        reader: RecordReader,
        named: Named,
        /// Whether nothing more of the stream can be understood, by whomever.
        is_lost: bool,
    },
    Native(Box<Receiver>),
}

/// What records without names are about.
#[derive(Clone, Debug, Default)]
struct Named {
    node: Option<usize>,
    alias: Option<Vec<u8>>,
    /// A bitmap that began.
    bitmap: Option<usize>,
}

impl BitmapMigration {
    /// A destination for the bitmaps of the nodes, at the first byte of a stream.
    pub fn incoming(&self, options: IncomingOptions) -> IncomingMigration {
        let allowed = Allowed {
            bitmaps: options.bitmaps_max,
            memory: options.bytes_max,
        };
        IncomingMigration {
            loader: Loader::new(self.nodes.clone(), self.mapping.clone(), allowed),
            input: match options.stream {
                StreamKind::Qemu(framing) => Input::Qemu {
                    reader: RecordReader::new(framing)
                        .with_footers(options.footers)
                        .with_foreign(options.foreign),
                    named: Named::default(),
                    is_lost: false,
                },
                StreamKind::Native { session } => Input::Native(Box::new(Receiver::new(session))),
            },
        }
    }
}

impl IncomingMigration {
    /// Loads what comes next, in pieces of any length. Says how many of the bytes were read: all, unless
    /// [nothing about bitmaps can follow](Self::is_done).
    ///
    /// When the bitmaps cannot be had here, but the stream is sound, that is told by an
    /// [event](Self::poll_event) and by [`finish`](Self::finish), and the bytes are read on for the sake of who
    /// shares the stream.
    ///
    /// # Errors
    ///
    /// [`Stream`](IncomingError::Stream): nothing more of the stream can be understood, and bitmaps that had not
    /// arrived are gone. [`Over`](IncomingError::Over) if that was told before.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<usize, IncomingError> {
        self.feed_by(bytes, false)
    }

    /// As [`feed`](Self::feed), and stops after the end mark of a part. For who has a stream of his own around
    /// the parts, as their length is not told.
    ///
    /// # Errors
    ///
    /// The same.
    pub fn feed_part(&mut self, bytes: &[u8]) -> Result<usize, IncomingError> {
        self.feed_by(bytes, true)
    }

    fn feed_by(&mut self, bytes: &[u8], stops_after_part: bool) -> Result<usize, IncomingError> {
        // The stream is sound: it is read on, and nothing is done.
        let is_sound = match (self.loader.ended(), &self.input) {
            (None, _) => true,
            (Some(_), Input::Qemu { is_lost: true, .. }) => false,
            (Some(error), Input::Qemu { .. }) => {
                matches!(error, IncomingError::Dropped(_) | IncomingError::Cancelled)
            }
            (Some(_), Input::Native(_)) => false,
        };
        if !is_sound {
            return Err(IncomingError::Over);
        }
        let Self { loader, input } = self;
        let error = match input {
            Input::Native(receiver) => match receiver.feed(loader, bytes) {
                Ok(()) => return Ok(bytes.len()),
                Err(error @ IncomingError::Broken(_)) => return Err(error),
                Err(error) => error,
            },
            Input::Qemu {
                reader,
                named,
                is_lost,
            } => {
                let mut sink = |record: &Record<'_>| named.apply(loader, record);
                let fed = if stops_after_part {
                    reader.feed_part(bytes, &mut sink)
                } else {
                    reader.feed(bytes, &mut sink)
                };
                match fed {
                    Ok(used) => return Ok(used),
                    // Devices come after bitmaps: if these are here, nothing is missed by not knowing those.
                    Err(StreamError {
                        why: Fault::ForeignSection { .. },
                        ..
                    }) if loader.has_all() => {
                        reader.stop();
                        return Ok(bytes.len());
                    }
                    Err(error) => {
                        *is_lost = true;
                        error.into()
                    }
                }
            }
        };
        loader.end(error.clone());
        Err(error)
    }

    /// Writes to `out` what is to be sent back to the source of a native stream, as much as fits, and says how
    /// much that is. Nothing is to be sent when it is 0, unless there was no room. QEMU's stream has nothing.
    pub fn next_bytes(&mut self, out: &mut [u8]) -> usize {
        match &mut self.input {
            Input::Qemu { .. } => 0,
            // Whoever gives up confirms nothing more.
            Input::Native(_) if !self.loader.is_loading() => 0,
            Input::Native(receiver) => receiver.next_bytes(out),
        }
    }

    /// A native stream goes on over another connection, from its first byte. What came over the former one is
    /// kept, and the source is told up to where.
    ///
    /// # Errors
    ///
    /// [`Over`](IncomingError::Over) if nothing can go on: it is over, or the stream is QEMU's.
    pub fn reconnect(&mut self) -> Result<(), IncomingError> {
        match &mut self.input {
            Input::Native(receiver) if self.loader.is_loading() => {
                receiver.reconnect();
                Ok(())
            }
            Input::Native(_) | Input::Qemu { .. } => Err(IncomingError::Over),
        }
    }

    /// Whether nothing about bitmaps can follow: the section has ended, or the stream.
    #[must_use]
    pub fn is_done(&self) -> bool {
        match &self.input {
            Input::Qemu { reader, .. } => reader.is_done(),
            Input::Native(receiver) => receiver.has_ended,
        }
    }

    /// Whether the stream stands before the first byte of a part.
    #[must_use]
    pub fn is_between_parts(&self) -> bool {
        match &self.input {
            Input::Qemu { reader, .. } => reader.is_between_parts(),
            Input::Native(receiver) => receiver.kept.is_empty(),
        }
    }

    /// Whether every bitmap that began has all its bits.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.loader.is_complete()
    }

    /// Nothing more comes: what is not complete is gone. If the guest does not run here yet, so is everything
    /// else, unless this says that all is well.
    ///
    /// # Errors
    ///
    /// [`Stream`](IncomingError::Stream) if the stream breaks off, [`Incomplete`](IncomingError::Incomplete),
    /// [`Dropped`](IncomingError::Dropped), or what ended it before.
    pub fn finish(&mut self) -> Result<(), IncomingError> {
        let finished = match self.loader.ended() {
            Some(error) => return Err(error.clone()),
            None => match self.input.finish() {
                Ok(()) => self.loader.check_complete(),
                Err(error) => Err(error.into()),
            },
        };
        if let Err(error) = &finished {
            self.loader.end(error.clone());
        }
        finished
    }

    /// The guest runs here from now on: each bitmap that recorded on the source records, whether its bits are
    /// here or not. Before the first write of the guest, with every node quiesced: what is written through the nodes
    /// before is taken for a part of the copy of the disk, and is in no bitmap. Told again it changes nothing.
    ///
    /// All bitmaps that are to record must have [begun](super::IncomingEvent::Started) by then: they are announced
    /// at the start of the stream, and the guest starts here once that was fed. One that begins later ends the
    /// stream with [`StartsLate`](super::Fault::StartsLate).
    ///
    /// # Errors
    ///
    /// See [`GuestStartError`]. It can be asked again.
    pub fn guest_starts(&mut self, guards: &[&QuiesceGuard]) -> Result<(), GuestStartError> {
        self.loader.guest_starts(guards)
    }

    /// Gives up: what has not arrived is gone. Bytes of QEMU's stream are still read, and nothing is done for
    /// them, so that other users of the stream can go on with it.
    pub fn cancel(&mut self) {
        self.loader.end(IncomingError::Cancelled);
    }

    /// All bitmaps that began, and how far each is.
    #[must_use]
    pub fn bitmaps(&self) -> Vec<IncomingBitmap> {
        self.loader.bitmaps()
    }

    /// What happened next, if something did that was not told yet.
    pub fn poll_event(&mut self) -> Option<IncomingEvent> {
        self.loader.events.pop_front()
    }
}

impl fmt::Debug for IncomingMigration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IncomingMigration")
            .field("bitmaps", &self.loader.bitmaps())
            .finish_non_exhaustive()
    }
}

impl Input {
    fn finish(&self) -> Result<(), StreamError> {
        match self {
            Input::Qemu { reader, .. } => reader.finish(),
            Input::Native(receiver) if receiver.has_ended => Ok(()),
            Input::Native(receiver) => Err(StreamError {
                at: receiver.at + receiver.kept.len() as u64,
                why: Fault::Truncated,
            }),
        }
    }
}

/// The state of a native stream.
struct Receiver {
    session: Session,
    /// Number of the frame that comes next.
    next: u64,
    /// The same as it was last told to the source.
    told: u64,
    has_greeted: bool,
    /// Whether the source waits to be told where to go on.
    owes_resume: bool,
    has_ended: bool,
    broken: Option<StreamError>,
    /// Bytes of a frame that is not whole, and how many it needs.
    kept: Vec<u8>,
    needed: usize,
    /// Bytes of this connection before those.
    at: u64,
    /// Answers that were made and not taken.
    answers: Vec<u8>,
}

impl Receiver {
    fn new(session: Session) -> Self {
        Self {
            session,
            next: 0,
            told: 0,
            has_greeted: false,
            owes_resume: false,
            has_ended: false,
            broken: None,
            kept: Vec::new(),
            needed: 0,
            at: 0,
            answers: Vec::new(),
        }
    }

    fn reconnect(&mut self) {
        self.has_greeted = false;
        self.owes_resume = true;
        self.broken = None;
        self.kept.clear();
        self.needed = 0;
        self.at = 0;
        self.answers.clear();
    }

    fn next_bytes(&mut self, out: &mut [u8]) -> usize {
        if self.answers.is_empty() {
            if self.owes_resume {
                self.owes_resume = false;
                native::resume(self.next, &self.session, &mut self.answers);
                self.told = self.next;
            } else if self.told < self.next && self.broken.is_none() {
                native::ack(self.next, &self.session, &mut self.answers);
                self.told = self.next;
            }
        }
        let len = out.len().min(self.answers.len());
        out[..len].copy_from_slice(&self.answers[..len]);
        self.answers.drain(..len);
        len
    }

    fn feed(&mut self, loader: &mut Loader, bytes: &[u8]) -> Result<(), IncomingError> {
        if let Some(error) = &self.broken {
            return Err(IncomingError::Broken(error.clone()));
        }
        let mut rest = bytes;
        while !rest.is_empty() || self.kept.len() >= self.needed.max(1) {
            let used = if self.kept.is_empty() {
                let step = self.frame(loader, rest)?;
                match step {
                    Some(used) => rest = &rest[used..],
                    None => {
                        self.kept.extend(rest);
                        rest = &[];
                    }
                }
                step
            } else {
                let missing = self.needed.saturating_sub(self.kept.len());
                let (more, after) = rest.split_at(missing.min(rest.len()));
                self.kept.extend(more);
                rest = after;
                if self.kept.len() < self.needed {
                    return Ok(());
                }
                let kept = std::mem::take(&mut self.kept);
                let step = self.frame(loader, &kept);
                self.kept = kept;
                let step = step?;
                if let Some(used) = step {
                    self.kept.drain(..used);
                    self.needed = 0;
                }
                step
            };
            self.at += used.unwrap_or(0) as u64;
        }
        Ok(())
    }

    /// Does what the first frame of `bytes` says, and tells how long it is. `None` if it is not whole.
    fn frame(&mut self, loader: &mut Loader, bytes: &[u8]) -> Result<Option<usize>, IncomingError> {
        let at = self.at;
        let (frame, used) = match native::parse(bytes) {
            Ok(native::Parsed::Frame(frame, used)) => (frame, used),
            Ok(native::Parsed::Needs(needed)) => {
                self.needed = needed;
                return Ok(None);
            }
            Err((within, why)) => return self.broke(at + within as u64, why),
        };
        let (expected, found) = (self.next, frame.number);
        if found != expected && !is_broken(Sabotage::IgnoreNumbers) {
            return self.broke(at, Fault::Sequence { expected, found });
        }
        if let FrameBody::Hello { session } = frame.body {
            if self.has_greeted {
                return self.broke(at, Fault::Frame { kind: bytes[0] });
            }
            if session != self.session {
                return self.broke(at, Fault::Session);
            }
            self.has_greeted = true;
            return Ok(Some(used));
        }
        if !self.has_greeted || self.has_ended {
            return self.broke(at, Fault::Frame { kind: bytes[0] });
        }
        match self.apply(loader, &frame.body, bytes[0]) {
            Ok(()) => {}
            Err(Refusal::Stream(why)) => return Err(StreamError { at, why }.into()),
            Err(Refusal::Bitmaps(unusable)) => return Err(IncomingError::Dropped(unusable)),
        }
        self.next += 1;
        Ok(Some(used))
    }

    fn broke<T>(&mut self, at: u64, why: Fault) -> Result<T, IncomingError> {
        let error = StreamError { at, why };
        self.broken = Some(error.clone());
        Err(IncomingError::Broken(error))
    }

    fn apply(
        &mut self,
        loader: &mut Loader,
        body: &FrameBody<'_>,
        kind: u8,
    ) -> Result<(), Refusal> {
        let known = |loader: &Loader, bitmap: u32| {
            let bitmap = bitmap as usize;
            (bitmap < loader.count())
                .then_some(bitmap)
                .ok_or(Fault::FrameField)
        };
        match *body {
            FrameBody::Start(ref start) => {
                if start.bitmap as usize != loader.count() {
                    return Err(Fault::FrameField.into());
                }
                let node = loader.node_of(start.names.0)?;
                check_disk(loader.node(node), start)?;
                let begins = Begins {
                    granularity: start.granularity,
                    is_enabled: start.is_enabled,
                    is_persistent: start.is_persistent,
                };
                loader.start(node, start.names.1, begins)?;
                Ok(())
            }
            FrameBody::Bits {
                bitmap,
                range,
                form,
            } => {
                let bits = match form {
                    Form::Zeroes => Bits::Zeroes,
                    Form::Ones => Bits::Ones,
                    Form::Bytes(bytes) => Bits::Bytes(bytes),
                };
                loader.bits(known(loader, bitmap)?, range, bits)
            }
            FrameBody::Complete { bitmap, ref digest } => {
                let bitmap = known(loader, bitmap)?;
                loader.complete(bitmap, |map| digest.is_of(map))
            }
            FrameBody::End { bitmaps } => {
                if bitmaps as usize != loader.count() {
                    return Err(Fault::FrameField.into());
                }
                self.has_ended = true;
                Ok(())
            }
            FrameBody::Hello { .. } | FrameBody::Ack { .. } | FrameBody::Resume { .. } => {
                Err(Fault::Frame { kind }.into())
            }
        }
    }
}

/// Whether the disk here is the one there.
fn check_disk(node: &MigratingNode, start: &StartFrame<'_>) -> Result<(), Fault> {
    fn differ<T: PartialEq>(a: Option<T>, b: Option<T>) -> bool {
        a.zip(b).is_some_and(|(a, b)| a != b)
    }
    let (name, here) = (node.name.clone(), node.node.len());
    if differ(node.identity, start.identity) {
        return Err(Fault::Identity { node: name });
    }
    if differ(node.generation, start.generation) {
        return Err(Fault::Generation { node: name });
    }
    if here != start.len {
        let there = start.len;
        return Err(Fault::Length {
            node: name,
            here,
            there,
        });
    }
    Ok(())
}

impl Named {
    /// Does what a record says, and tells wrong bitmaps from a wrong stream.
    fn apply(&mut self, loader: &mut Loader, record: &Record<'_>) -> Result<(), StreamError> {
        if !loader.is_loading() {
            return Ok(());
        }
        match self.try_apply(loader, record) {
            Ok(()) => Ok(()),
            Err(Refusal::Bitmaps(unusable)) => {
                loader.end(IncomingError::Dropped(unusable));
                Ok(())
            }
            Err(Refusal::Stream(why)) => Err(StreamError { at: record.at, why }),
        }
    }

    fn try_apply(&mut self, loader: &mut Loader, record: &Record<'_>) -> Result<(), Refusal> {
        if let Some(node) = record.node {
            self.node = Some(loader.node_of(node)?);
        }
        if let Some(bitmap) = record.bitmap {
            self.alias = Some(bitmap.to_vec());
        }
        let no_bitmap = || Refusal::Bitmaps(super::error::Unusable::NoBitmap);
        if let RecordBody::Start {
            granularity,
            is_enabled,
            is_persistent,
        } = record.body
        {
            let node = self.node.ok_or_else(no_bitmap)?;
            let alias = self.alias.as_deref().ok_or_else(no_bitmap)?;
            let begins = Begins {
                granularity: granularity.into(),
                is_enabled,
                is_persistent,
            };
            self.bitmap = Some(loader.start(node, alias, begins)?);
            return Ok(());
        }
        // A bitmap stays selected until another is named, also when a node is.
        if record.bitmap.is_some() {
            let node = self.node.ok_or_else(no_bitmap)?;
            let alias = self.alias.as_deref().ok_or_else(no_bitmap)?;
            self.bitmap = Some(loader.find(node, alias)?);
        }
        match record.body {
            RecordBody::Nothing | RecordBody::Start { .. } => Ok(()),
            RecordBody::Complete => {
                let bitmap = self.bitmap.ok_or_else(no_bitmap)?;
                loader.complete(bitmap, |_| true)
            }
            RecordBody::Bits {
                first_sector,
                sectors,
                bits,
            } => {
                let bitmap = self.bitmap.ok_or_else(no_bitmap)?;
                let start = first_sector.checked_mul(SECTOR);
                let range =
                    start.and_then(|start| ByteRange::at(start, u64::from(sectors) * SECTOR));
                let range = range.ok_or(Fault::SectorTooLarge {
                    sector: first_sector,
                })?;
                loader.bits(bitmap, range, bits.map_or(Bits::Zeroes, Bits::Bytes))
            }
        }
    }
}
