//! A small NBD client, enough to run jobs on disks that other programs hold.
//!
//! Written from the public description of the protocol: fixed newstyle negotiation, structured replies,
//! metadata contexts for block status, many requests in flight.
//!
//! ```text
//!  future ──request──▶ pending (by cookie) ──▶ queue ──▶ sender thread ──▶ socket
//!     ▲                   │                                                  │
//!     └──── oneshot ◀─────┴──────────────── receiver thread ◀────────────────┘
//! ```
//!
//! 1. A request is pending from the moment it is queued until it was sent in full *and* answered, or the
//!    connection is dead. Its buffer belongs to it for as long, also when its future was dropped.
//! 2. Cookies grow and are never used twice, so "all requests made earlier" is "all cookies below".
//! 3. A reply that breaks the protocol ends the connection: what follows it cannot be trusted either.
//!    Every pending request is then answered with an error, and every later one, too.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use blockjob::ByteRange;
use blockjob::io::{
    AlignedBuf, BlockDevice, BufResult, Content, Extent, Limits, RangeLimits, ReadAt, Unmap,
    WriteAt,
};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

const MAGIC_INIT: u64 = 0x4e42_444d_4147_4943;
const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const MAGIC_REQUEST: u32 = 0x2560_9513;
const MAGIC_SIMPLE_REPLY: u32 = 0x6744_6698;
const MAGIC_STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// Handshake flag of both sides: fixed newstyle.
const FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag of both sides: no padding at the end of the old way to enter transmission.
const NO_ZEROES: u16 = 2;

const OPTION_GO: u32 = 7;
const OPTION_STRUCTURED_REPLY: u32 = 8;
const OPTION_SET_META_CONTEXT: u32 = 10;

const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_META_CONTEXT: u32 = 4;
const REPLY_IS_ERROR: u32 = 1 << 31;
/// No answer to an option has a reason to be longer.
const OPTION_REPLY_MAX: u32 = 64 << 10;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const CAN_FLUSH: u16 = 1 << 2;
const CAN_TRIM: u16 = 1 << 5;
const CAN_WRITE_ZEROES: u16 = 1 << 6;

const FLAG_NO_HOLE: u16 = 1 << 1;
const FLAG_REQ_ONE: u16 = 1 << 3;

const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_OFFSET_DATA: u16 = 1;
const CHUNK_OFFSET_HOLE: u16 = 2;
const CHUNK_BLOCK_STATUS: u16 = 5;
const CHUNK_IS_ERROR: u16 = 1 << 15;
/// An error number, the length of a message, the message, and perhaps an offset.
const CHUNK_ERROR_MAX: u32 = 4 + 2 + 4096 + 8;

const STATE_HOLE: u32 = 1;
const STATE_ZERO: u32 = 2;

/// The longest request without data: what is left of 32 bits at any alignment, and short enough that a
/// server answers it soon.
const RANGE_MAX: u64 = 1 << 30;
/// How long a server may think about one step of the negotiation.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A disk that a server holds, over one connection.
///
/// Dropping it closes the connection.
pub(crate) struct Nbd {
    shared: Arc<Shared>,
    stream: UnixStream,
    queue: mpsc::Sender<Outgoing>,
    export: Export,
    limits: Limits,
}

/// What the server tells of its disk.
#[derive(Clone, Copy, Debug, Default)]
struct Export {
    len: u64,
    flags: u16,
    /// Least, preferred and largest length of a request that carries data.
    block_sizes: Option<[u32; 3]>,
    contexts: Contexts,
}

/// The numbers under which the server speaks of metadata, where it offers it.
#[derive(Clone, Copy, Debug, Default)]
struct Contexts {
    /// `base:allocation`.
    allocation: Option<u32>,
    /// `qemu:allocation-depth`: 0 nowhere, 1 in the topmost layer, more for those below.
    depth: Option<u32>,
}

/// What both threads and all futures share.
struct Shared {
    state: Mutex<State>,
    /// A request is no longer pending.
    ended: Notify,
}

struct State {
    pending: BTreeMap<u64, Pending>,
    next_cookie: u64,
    /// Why there will be no more answers.
    dead: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Read = 0,
    Write = 1,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
    BlockStatus = 7,
}

struct Pending {
    command: Command,
    range: ByteRange,
    /// The buffer of a read or a write, while neither of the threads has it.
    buf: Option<AlignedBuf>,
    /// What of a read has come, in the order it came.
    covered: Vec<ByteRange>,
    covered_len: u64,
    /// First extent of each metadata context: length and flags.
    extents: BTreeMap<u32, (u32, u32)>,
    error: Option<io::Error>,
    is_sent: bool,
    is_answered: bool,
    reply: oneshot::Sender<Answer>,
}

struct Answer {
    result: io::Result<()>,
    buf: Option<AlignedBuf>,
    extents: BTreeMap<u32, (u32, u32)>,
}

/// What is known of a range.
struct RangeState {
    /// How far it goes on like that.
    len: u64,
    /// Flags of `base:allocation`.
    allocation: Option<u32>,
    /// Value of `qemu:allocation-depth`.
    depth: Option<u32>,
}

/// A request on its way to the socket.
struct Outgoing {
    cookie: u64,
    header: [u8; 28],
    payload: Option<AlignedBuf>,
}

impl Nbd {
    /// Connects to a server's socket, and to its disk without a name.
    ///
    /// # Errors
    ///
    /// If nobody listens, or what does speaks another protocol.
    pub(crate) fn connect(socket: &Path) -> io::Result<Self> {
        Self::over(UnixStream::connect(socket)?)
    }

    /// As [`connect`](Self::connect), over a socket that is connected already.
    pub(crate) fn over(mut stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
        stream.set_write_timeout(Some(HANDSHAKE_TIMEOUT))?;
        let export = negotiate(&mut stream)?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        let limits = export.limits()?;

        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                pending: BTreeMap::new(),
                next_cookie: 1,
                dead: None,
            }),
            ended: Notify::new(),
        });
        let (queue, outgoing) = mpsc::channel();
        let (socket, both) = (stream.try_clone()?, Arc::clone(&shared));
        thread::spawn(move || send(socket, &both, outgoing));
        let (socket, both) = (stream.try_clone()?, Arc::clone(&shared));
        thread::spawn(move || receive(socket, &both));
        Ok(Self {
            shared,
            stream,
            queue,
            export,
            limits,
        })
    }

    /// Tells what the protocol does not: the cluster size, or whether zeroes are cheap.
    #[must_use]
    pub(crate) fn with_limits(mut self, change: impl FnOnce(&mut Limits)) -> Self {
        change(&mut self.limits);
        self
    }

    /// Whether the server tells which layer holds a range.
    pub(crate) fn tells_depth(&self) -> bool {
        self.export.contexts.depth.is_some()
    }

    async fn request(
        &self,
        command: Command,
        flags: u16,
        range: ByteRange,
        buf: Option<AlignedBuf>,
    ) -> Answer {
        let Ok(len) = u32::try_from(range.len()) else {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "longer than 32 bits can tell");
            return Answer::failed(error, buf);
        };
        let answer = match self.submit(command, flags, range, len, buf) {
            Ok(answer) => answer,
            Err(answer) => return answer,
        };
        answer
            .await
            .expect("a pending request is answered, at the latest when the connection dies")
    }

    fn submit(
        &self,
        command: Command,
        flags: u16,
        range: ByteRange,
        len: u32,
        buf: Option<AlignedBuf>,
    ) -> Result<oneshot::Receiver<Answer>, Answer> {
        let (reply, answer) = oneshot::channel();
        let mut state = self.shared.state.lock();
        if let Some(why) = &state.dead {
            return Err(Answer::failed(dead(why), buf));
        }
        let cookie = state.next_cookie;
        state.next_cookie += 1;
        let (payload, buf) = match command {
            Command::Write => (buf, None),
            _ => (None, buf),
        };
        state.pending.insert(
            cookie,
            Pending {
                command,
                range,
                buf,
                covered: Vec::new(),
                covered_len: 0,
                extents: BTreeMap::new(),
                error: None,
                is_sent: false,
                is_answered: false,
                reply,
            },
        );
        let mut header = [0; 28];
        header[..4].copy_from_slice(&MAGIC_REQUEST.to_be_bytes());
        header[4..6].copy_from_slice(&flags.to_be_bytes());
        header[6..8].copy_from_slice(&(command as u16).to_be_bytes());
        header[8..16].copy_from_slice(&cookie.to_be_bytes());
        header[16..24].copy_from_slice(&range.start().to_be_bytes());
        header[24..].copy_from_slice(&len.to_be_bytes());
        self.queue
            .send(Outgoing {
                cookie,
                header,
                payload,
            })
            .expect("the sender takes requests until this side is dropped");
        Ok(answer)
    }

    /// What is at the start of `range`, as far as the server tells.
    async fn state_at(&self, range: ByteRange) -> io::Result<RangeState> {
        let asked = range.split_at(range.start().saturating_add(RANGE_MAX)).0;
        let contexts = self.export.contexts;
        if asked.is_empty() || (contexts.allocation.is_none() && contexts.depth.is_none()) {
            return Ok(RangeState {
                len: range.len(),
                allocation: None,
                depth: None,
            });
        }
        let answer = self
            .request(Command::BlockStatus, FLAG_REQ_ONE, asked, None)
            .await;
        answer.result?;
        let of = |context: Option<u32>| context.and_then(|id| answer.extents.get(&id)).copied();
        let (allocation, depth) = (of(contexts.allocation), of(contexts.depth));
        let lens = [allocation, depth]
            .into_iter()
            .flatten()
            .map(|(len, _)| len);
        Ok(RangeState {
            len: lens
                .map(u64::from)
                .min()
                .map_or(asked.len(), |len| len.min(asked.len())),
            allocation: allocation.map(|(_, flags)| flags),
            depth: depth.map(|(_, depth)| depth),
        })
    }

    /// Whether all of `range` reads as zeroes and has no storage.
    async fn is_hole(&self, range: ByteRange) -> io::Result<bool> {
        let mut rest = range;
        while !rest.is_empty() {
            let state = self.state_at(rest).await?;
            if state.allocation != Some(STATE_HOLE | STATE_ZERO) {
                return Ok(false);
            }
            rest = rest.split_at(rest.start() + state.len).1;
        }
        Ok(true)
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        // Ends both threads: the receiver reads the end of the stream, and the sender is left by its queue.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl fmt::Debug for Nbd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nbd")
            .field("export", &self.export)
            .finish_non_exhaustive()
    }
}

impl BlockDevice for Nbd {
    type Buf = AlignedBuf;

    fn limits(&self) -> Limits {
        self.limits
    }
}

impl ReadAt for Nbd {
    async fn read_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        self.transfer(Command::Read, offset, buf).await
    }

    async fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        let state = self.state_at(range).await?;
        Ok(Extent {
            len: state.len,
            // A hole that does not read as zeroes shows what lies below: it is data, never undefined.
            content: match state.allocation {
                Some(flags) if flags & STATE_ZERO != 0 => Content::Zero,
                _ => Content::Data,
            },
            // Not knowing it, a range is taken for one of the topmost layer: too much is copied then.
            in_top: state.depth.is_none_or(|depth| depth == 1),
        })
    }
}

impl WriteAt for Nbd {
    async fn write_at(&self, offset: u64, buf: AlignedBuf) -> BufResult<AlignedBuf> {
        self.transfer(Command::Write, offset, buf).await
    }

    async fn write_zeroes(&self, range: ByteRange, unmap: Unmap) -> io::Result<()> {
        // Zeroing what is a hole already makes a qcow2 image grow tables for it: 128 KiB per GiB.
        if unmap == Unmap::Allowed && self.is_hole(range).await? {
            return Ok(());
        }
        let flags = match unmap {
            Unmap::Allowed => 0,
            Unmap::Forbidden => FLAG_NO_HOLE,
        };
        self.request(Command::WriteZeroes, flags, range, None)
            .await
            .result
    }

    async fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.request(Command::Trim, 0, range, None).await.result
    }

    async fn flush(&self) -> io::Result<()> {
        if self.export.flags & CAN_FLUSH == 0 {
            return Ok(());
        }
        self.request(Command::Flush, 0, (0..0).into(), None)
            .await
            .result
    }

    /// A server that lost its connection may still be at work on what it had received. No later request
    /// of this device can come after that, for the device is dead, too.
    async fn settle(&self) {
        let before = self.shared.state.lock().next_cookie;
        loop {
            let ended = self.shared.ended.notified();
            let is_settled = {
                let state = self.shared.state.lock();
                state.pending.range(..before).next().is_none()
            };
            if is_settled {
                return;
            }
            ended.await;
        }
    }

    fn cancel_in_flight(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Nbd {
    async fn transfer(
        &self,
        command: Command,
        offset: u64,
        buf: AlignedBuf,
    ) -> BufResult<AlignedBuf> {
        let len = buf.as_ref().len() as u64;
        let Some(range) = ByteRange::at(offset, len) else {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "ends past 2^64");
            return (Err(error), buf);
        };
        if range.is_empty() {
            return (Ok(()), buf);
        }
        let answer = self.request(command, 0, range, Some(buf)).await;
        let buf = answer.buf.expect("a transfer gives its buffer back");
        (answer.result, buf)
    }
}

impl Answer {
    fn failed(error: io::Error, buf: Option<AlignedBuf>) -> Self {
        Self {
            result: Err(error),
            buf,
            extents: BTreeMap::new(),
        }
    }
}

impl Export {
    fn limits(&self) -> io::Result<Limits> {
        // Without a word about it, a server takes these.
        let [least, _, largest] = self.block_sizes.unwrap_or([1, 4096, 32 << 20]);
        if !least.is_power_of_two() || largest < least || !self.len.is_multiple_of(u64::from(least))
        {
            return Err(malformed("block sizes that cannot be"));
        }
        let whole = |len: u64| len - len % u64::from(least);
        let ranges = RangeLimits {
            align: least,
            max: whole(RANGE_MAX),
        };
        let mut limits = Limits::new(self.len);
        limits.request_align = least;
        limits.max_transfer = u32::try_from(whole(largest.min(1 << 30).into())).expect("32 bits");
        limits.write_zeroes = (self.flags & CAN_WRITE_ZEROES != 0).then_some(ranges);
        limits.discard = (self.flags & CAN_TRIM != 0).then_some(ranges);
        limits
            .check()
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(limits)
    }
}

/// Speaks until the server is ready to take requests.
fn negotiate(stream: &mut UnixStream) -> io::Result<Export> {
    if read_u64(stream)? != MAGIC_INIT || read_u64(stream)? != MAGIC_OPTION {
        return Err(malformed("not an NBD server of the newstyle"));
    }
    let flags = read_u16(stream)?;
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(malformed("not a fixed newstyle server"));
    }
    stream.write_all(&u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes())?;

    send_option(stream, OPTION_STRUCTURED_REPLY, &[])?;
    if read_option_reply(stream, OPTION_STRUCTURED_REPLY)?.0 != REPLY_ACK {
        return Err(malformed("the server does not know structured replies"));
    }
    let contexts = set_meta_contexts(stream)?;

    // The name of the export, which is none, then the wish to know the block sizes.
    let mut go = Vec::new();
    go.extend_from_slice(&0u32.to_be_bytes());
    go.extend_from_slice(&1u16.to_be_bytes());
    go.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
    send_option(stream, OPTION_GO, &go)?;
    let mut export = None;
    let mut block_sizes = None;
    loop {
        let (kind, data) = read_option_reply(stream, OPTION_GO)?;
        match kind {
            REPLY_ACK => break,
            REPLY_INFO => {
                let mut data = data.as_slice();
                match read_u16(&mut data)? {
                    INFO_EXPORT => export = Some((read_u64(&mut data)?, read_u16(&mut data)?)),
                    INFO_BLOCK_SIZE => {
                        let sizes = [(); 3].map(|()| read_u32(&mut data));
                        let [least, preferred, largest] = sizes;
                        block_sizes = Some([least?, preferred?, largest?]);
                    }
                    _ => {}
                }
            }
            _ => return Err(malformed("the server does not give its disk")),
        }
    }
    let Some((len, flags)) = export else {
        return Err(malformed("the server does not tell of its disk"));
    };
    Ok(Export {
        len,
        flags,
        block_sizes,
        contexts,
    })
}

fn set_meta_contexts(stream: &mut UnixStream) -> io::Result<Contexts> {
    const ALLOCATION: &str = "base:allocation";
    const DEPTH: &str = "qemu:allocation-depth";
    let mut wishes = Vec::new();
    wishes.extend_from_slice(&0u32.to_be_bytes());
    wishes.extend_from_slice(&2u32.to_be_bytes());
    for name in [ALLOCATION, DEPTH] {
        let len = u32::try_from(name.len()).expect("short");
        wishes.extend_from_slice(&len.to_be_bytes());
        wishes.extend_from_slice(name.as_bytes());
    }
    send_option(stream, OPTION_SET_META_CONTEXT, &wishes)?;
    let mut contexts = Contexts::default();
    loop {
        let (kind, data) = read_option_reply(stream, OPTION_SET_META_CONTEXT)?;
        match kind {
            REPLY_ACK => return Ok(contexts),
            REPLY_META_CONTEXT => {
                let (mut id, name) = data
                    .split_at_checked(4)
                    .ok_or_else(|| malformed("a metadata context without a number"))?;
                let id = read_u32(&mut id)?;
                if name == ALLOCATION.as_bytes() {
                    contexts.allocation = Some(id);
                } else if name == DEPTH.as_bytes() {
                    contexts.depth = Some(id);
                } else {
                    return Err(malformed("a metadata context that was not asked for"));
                }
            }
            // The server does not know any: then nothing is known of its holes.
            kind if kind & REPLY_IS_ERROR != 0 => return Ok(Contexts::default()),
            _ => return Err(malformed("not an answer to metadata contexts")),
        }
    }
}

fn send_option(stream: &mut UnixStream, option: u32, data: &[u8]) -> io::Result<()> {
    let len = u32::try_from(data.len()).expect("options are short");
    let mut bytes = MAGIC_OPTION.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes.extend_from_slice(data);
    stream.write_all(&bytes)
}

fn read_option_reply(stream: &mut UnixStream, option: u32) -> io::Result<(u32, Vec<u8>)> {
    if read_u64(stream)? != MAGIC_OPTION_REPLY || read_u32(stream)? != option {
        return Err(malformed("not an answer to this option"));
    }
    let kind = read_u32(stream)?;
    let len = read_u32(stream)?;
    if len > OPTION_REPLY_MAX {
        return Err(malformed("the answer to an option is too long"));
    }
    let mut data = vec![0; len as usize];
    stream.read_exact(&mut data)?;
    Ok((kind, data))
}

/// The sender thread. It goes on after an error, so that the buffers of what is queued come back.
fn send(mut stream: UnixStream, shared: &Shared, outgoing: mpsc::Receiver<Outgoing>) {
    let mut is_open = true;
    for Outgoing {
        cookie,
        header,
        payload,
    } in outgoing
    {
        if is_open {
            let sent = stream
                .write_all(&header)
                .and_then(|()| stream.write_all(payload.as_ref().map_or(&[], AsRef::as_ref)));
            if sent.is_err() {
                is_open = false;
                // The receiver reads the end of the stream, and answers everything.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        let mut state = shared.state.lock();
        let request = state
            .pending
            .get_mut(&cookie)
            .expect("a request is pending until it was sent");
        request.is_sent = true;
        if payload.is_some() {
            request.buf = payload;
        }
        shared.end_if_over(&mut state, cookie);
    }
}

/// The receiver thread.
fn receive(mut stream: UnixStream, shared: &Shared) {
    let error = loop {
        if let Err(error) = receive_one(&mut stream, shared) {
            break error;
        }
    };
    let _ = stream.shutdown(Shutdown::Both);
    let mut state = shared.state.lock();
    let why = error.to_string();
    let cookies: Vec<u64> = state.pending.keys().copied().collect();
    for cookie in cookies {
        let request = state.pending.get_mut(&cookie).expect("listed just now");
        if !request.is_answered {
            request.error.get_or_insert_with(|| dead(&why));
            request.is_answered = true;
        }
        shared.end_if_over(&mut state, cookie);
    }
    state.dead = Some(why);
}

/// One simple reply, or one chunk of a structured one.
fn receive_one(stream: &mut UnixStream, shared: &Shared) -> io::Result<()> {
    match read_u32(stream)? {
        MAGIC_SIMPLE_REPLY => {
            let error = read_u32(stream)?;
            let cookie = read_u64(stream)?;
            shared.answered(cookie, |request| {
                if matches!(request.command, Command::Read | Command::BlockStatus) {
                    return Err(malformed("a simple reply to a request that has data"));
                }
                if error != 0 {
                    request.error = Some(server_error(error, ""));
                }
                Ok(true)
            })
        }
        MAGIC_STRUCTURED_REPLY => {
            let flags = read_u16(stream)?;
            let kind = read_u16(stream)?;
            let cookie = read_u64(stream)?;
            let len = read_u32(stream)?;
            let is_last = flags & CHUNK_DONE != 0;
            match kind {
                CHUNK_NONE if len == 0 && is_last => {}
                CHUNK_OFFSET_DATA => receive_data(stream, shared, cookie, len)?,
                CHUNK_OFFSET_HOLE if len == 12 => {
                    let offset = read_u64(stream)?;
                    let len = read_u32(stream)?;
                    shared.answered(cookie, |request| {
                        let bytes = request.cover(offset, len.into())?;
                        let buf = request.buf.as_mut().expect("back from the last chunk");
                        buf.as_mut()[bytes].fill(0);
                        Ok(false)
                    })?;
                }
                // One extent, for that is what is asked for.
                CHUNK_BLOCK_STATUS if len == 12 => {
                    let context = read_u32(stream)?;
                    let extent = (read_u32(stream)?, read_u32(stream)?);
                    shared.answered(cookie, |request| {
                        if request.command != Command::BlockStatus || extent.0 == 0 {
                            return Err(malformed("block status that cannot be"));
                        }
                        match request.extents.insert(context, extent) {
                            None => Ok(false),
                            Some(_) => Err(malformed("block status told twice")),
                        }
                    })?;
                }
                kind if kind & CHUNK_IS_ERROR != 0 && (6..=CHUNK_ERROR_MAX).contains(&len) => {
                    let mut data = vec![0; len as usize];
                    stream.read_exact(&mut data)?;
                    let mut data = data.as_slice();
                    let error = read_u32(&mut data)?;
                    let message = usize::from(read_u16(&mut data)?);
                    let message = data
                        .get(..message)
                        .ok_or_else(|| malformed("an error longer than its chunk"))?;
                    let error = server_error(error, &String::from_utf8_lossy(message));
                    shared.answered(cookie, |request| {
                        request.error.get_or_insert(error);
                        Ok(false)
                    })?;
                }
                _ => return Err(malformed("a chunk of a kind or length that cannot be")),
            }
            shared.answered(cookie, |request| {
                if is_last {
                    request.check_complete()?;
                }
                Ok(is_last)
            })
        }
        _ => Err(malformed("not the start of a reply")),
    }
}

fn receive_data(stream: &mut UnixStream, shared: &Shared, cookie: u64, len: u32) -> io::Result<()> {
    let len = u64::from(len)
        .checked_sub(8)
        .ok_or_else(|| malformed("data without its offset"))?;
    let offset = read_u64(stream)?;
    let mut taken = None;
    shared.answered(cookie, |request| {
        let bytes = request.cover(offset, len)?;
        let buf = request.buf.take().expect("back from the last chunk");
        taken = Some((bytes, buf));
        Ok(false)
    })?;
    let (bytes, mut buf) = taken.expect("set when there is no error");
    // Not under the lock: the peer may take its time.
    let read = stream.read_exact(&mut buf.as_mut()[bytes]);
    shared.answered(cookie, |request| {
        request.buf = Some(buf);
        Ok(false)
    })?;
    read
}

impl Shared {
    /// Lets `change` see to a pending request; it tells whether that was the last of its answer.
    fn answered(
        &self,
        cookie: u64,
        change: impl FnOnce(&mut Pending) -> io::Result<bool>,
    ) -> io::Result<()> {
        let mut state = self.state.lock();
        let request = state
            .pending
            .get_mut(&cookie)
            .filter(|request| !request.is_answered)
            .ok_or_else(|| malformed("an answer to nothing"))?;
        request.is_answered = change(request)?;
        self.end_if_over(&mut state, cookie);
        Ok(())
    }

    fn end_if_over(&self, state: &mut State, cookie: u64) {
        let request = &state.pending[&cookie];
        if !(request.is_sent && request.is_answered) {
            return;
        }
        let request = state.pending.remove(&cookie).expect("looked at just now");
        // Nobody takes it if the future was dropped.
        let _ = request.reply.send(Answer {
            result: request.error.map_or(Ok(()), Err),
            buf: request.buf,
            extents: request.extents,
        });
        self.ended.notify_waiters();
    }
}

impl Pending {
    /// Notes that a part of a read has come, and tells where in the buffer it goes.
    fn cover(&mut self, offset: u64, len: u64) -> io::Result<std::ops::Range<usize>> {
        let part = ByteRange::at(offset, len)
            .filter(|&part| !part.is_empty() && self.range.contains_range(part))
            .filter(|_| self.command == Command::Read)
            .ok_or_else(|| malformed("data that was not asked for"))?;
        self.covered_len += len;
        if self.covered_len > self.range.len() {
            return Err(malformed("data told twice"));
        }
        self.covered.push(part);
        let place = |offset: u64| {
            usize::try_from(offset - self.range.start()).expect("within a buffer in memory")
        };
        Ok(place(part.start())..place(part.end()))
    }

    /// Whether the answer, now that it is over, has all that it must.
    fn check_complete(&mut self) -> io::Result<()> {
        if self.error.is_some() {
            return Ok(());
        }
        match self.command {
            Command::Read => {
                self.covered.sort_unstable_by_key(|part| part.start());
                let is_twice = self.covered.windows(2).any(|two| two[0].overlaps(two[1]));
                if is_twice || self.covered_len != self.range.len() {
                    return Err(malformed("a part of the data is missing"));
                }
            }
            Command::BlockStatus if self.extents.is_empty() => {
                return Err(malformed("no block status"));
            }
            _ => {}
        }
        Ok(())
    }
}

/// The protocol's error numbers, which are the same on every system.
fn server_error(error: u32, message: &str) -> io::Error {
    let kind = match error {
        1 => io::ErrorKind::PermissionDenied,
        12 => io::ErrorKind::OutOfMemory,
        22 => io::ErrorKind::InvalidInput,
        28 => io::ErrorKind::StorageFull,
        95 => io::ErrorKind::Unsupported,
        108 => io::ErrorKind::NotConnected,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, format!("the server answers error {error} {message}"))
}

fn dead(why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::NotConnected,
        format!("the connection is dead: {why}"),
    )
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn read_u16(from: &mut impl Read) -> io::Result<u16> {
    let mut bytes = [0; 2];
    from.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

fn read_u32(from: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    from.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn read_u64(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 1 << 20;
    const READ_AT: u64 = 4096;
    const READ_LEN: usize = 8;

    /// A client, and the server's end of its connection after the negotiation.
    fn pair() -> (Nbd, UnixStream) {
        let (client, mut server) = UnixStream::pair().unwrap();
        let serving = thread::spawn(move || {
            server.write_all(&MAGIC_INIT.to_be_bytes()).unwrap();
            server.write_all(&MAGIC_OPTION.to_be_bytes()).unwrap();
            server.write_all(&FIXED_NEWSTYLE.to_be_bytes()).unwrap();
            assert_eq!(read_u32(&mut server).unwrap(), u32::from(FIXED_NEWSTYLE));
            loop {
                assert_eq!(read_u64(&mut server).unwrap(), MAGIC_OPTION);
                let option = read_u32(&mut server).unwrap();
                let mut data = vec![0; read_u32(&mut server).unwrap() as usize];
                server.read_exact(&mut data).unwrap();
                if option == OPTION_SET_META_CONTEXT {
                    let mut context = 7u32.to_be_bytes().to_vec();
                    context.extend_from_slice(b"base:allocation");
                    option_reply(&mut server, option, REPLY_META_CONTEXT, &context);
                }
                if option == OPTION_GO {
                    let mut info = INFO_EXPORT.to_be_bytes().to_vec();
                    info.extend_from_slice(&LEN.to_be_bytes());
                    info.extend_from_slice(&(CAN_FLUSH | CAN_TRIM).to_be_bytes());
                    option_reply(&mut server, option, REPLY_INFO, &info);
                }
                option_reply(&mut server, option, REPLY_ACK, &[]);
                if option == OPTION_GO {
                    return server;
                }
            }
        });
        let client = Nbd::over(client).unwrap();
        (client, serving.join().unwrap())
    }

    fn option_reply(server: &mut UnixStream, option: u32, kind: u32, data: &[u8]) {
        server.write_all(&MAGIC_OPTION_REPLY.to_be_bytes()).unwrap();
        for word in [option, kind, data.len() as u32] {
            server.write_all(&word.to_be_bytes()).unwrap();
        }
        server.write_all(data).unwrap();
    }

    /// Cookie of the next request, whose payload, if any, is not read.
    fn next_request(server: &mut UnixStream) -> u64 {
        let mut header = [0; 28];
        server.read_exact(&mut header).unwrap();
        u64::from_be_bytes(header[8..16].try_into().unwrap())
    }

    fn chunk(flags: u16, kind: u16, cookie: u64, data: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC_STRUCTURED_REPLY.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn data_chunk(flags: u16, cookie: u64, offset: u64, data: &[u8]) -> Vec<u8> {
        let data = [&offset.to_be_bytes(), data].concat();
        chunk(flags, CHUNK_OFFSET_DATA, cookie, &data)
    }

    fn hole_chunk(flags: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
        let data = [offset.to_be_bytes().as_slice(), &len.to_be_bytes()].concat();
        chunk(flags, CHUNK_OFFSET_HOLE, cookie, &data)
    }

    fn buffer() -> AlignedBuf {
        let mut buf = AlignedBuf::new(READ_LEN, 1).unwrap();
        buf.as_mut().fill(0xee);
        buf
    }

    /// One read, answered with what `answer` makes of its cookie.
    async fn read(answer: impl FnOnce(u64) -> Vec<u8> + Send + 'static) -> io::Result<Vec<u8>> {
        let (client, mut server) = pair();
        let serving = thread::spawn(move || {
            let cookie = next_request(&mut server);
            server.write_all(&answer(cookie)).unwrap();
            // An answer that is too short ends here.
            server.shutdown(Shutdown::Write).unwrap();
            server
        });
        let (result, buf) = client.read_at(READ_AT, buffer()).await;
        drop(serving.join().unwrap());
        assert_eq!(buf.as_ref().len(), READ_LEN, "the buffer comes back");
        client.settle().await;
        result.map(|()| buf.as_ref().to_vec())
    }

    #[tokio::test]
    async fn a_read_is_put_together_from_data_and_holes_in_any_order() {
        let bytes = read(|cookie| {
            [
                data_chunk(0, cookie, READ_AT + 6, b"yz"),
                hole_chunk(0, cookie, READ_AT + 3, 3),
                data_chunk(CHUNK_DONE, cookie, READ_AT, b"abc"),
            ]
            .concat()
        })
        .await
        .unwrap();
        assert_eq!(bytes, b"abc\0\0\0yz");
    }

    #[tokio::test]
    async fn an_error_of_the_server_is_told_with_its_kind() {
        let error = read(|cookie| {
            let data = [28u32.to_be_bytes().as_slice(), &4u16.to_be_bytes(), b"full"].concat();
            chunk(CHUNK_DONE, CHUNK_IS_ERROR | 1, cookie, &data)
        })
        .await
        .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(error.to_string().contains("full"));
    }

    #[tokio::test]
    async fn every_malformed_answer_is_an_error() {
        type Make = fn(u64) -> Vec<u8>;
        let malformed: &[(&str, Make)] = &[
            ("another magic", |_| vec![0; 64]),
            ("the end of the stream", |_| Vec::new()),
            ("half a chunk", |cookie| {
                data_chunk(CHUNK_DONE, cookie, READ_AT, b"abcdefgh")[..30].to_vec()
            }),
            ("another cookie", |cookie| {
                data_chunk(CHUNK_DONE, cookie + 1, READ_AT, b"abcdefgh")
            }),
            ("too little data", |cookie| {
                data_chunk(CHUNK_DONE, cookie, READ_AT, b"abc")
            }),
            ("too much data", |cookie| {
                data_chunk(CHUNK_DONE, cookie, READ_AT, b"abcdefghi")
            }),
            ("data from before", |cookie| {
                data_chunk(CHUNK_DONE, cookie, READ_AT - 1, b"abcdefgh")
            }),
            ("an offset that overflows", |cookie| {
                data_chunk(CHUNK_DONE, cookie, u64::MAX, b"abcdefgh")
            }),
            ("the same data twice", |cookie| {
                let half = data_chunk(0, cookie, READ_AT, b"abcd");
                [half, data_chunk(CHUNK_DONE, cookie, READ_AT, b"abcd")].concat()
            }),
            ("an empty hole", |cookie| {
                hole_chunk(CHUNK_DONE, cookie, READ_AT, 0)
            }),
            ("a hole of 4 GiB", |cookie| {
                hole_chunk(CHUNK_DONE, cookie, READ_AT, u32::MAX)
            }),
            ("data without an offset", |cookie| {
                chunk(CHUNK_DONE, CHUNK_OFFSET_DATA, cookie, b"abc")
            }),
            ("nothing", |cookie| {
                chunk(CHUNK_DONE, CHUNK_NONE, cookie, &[])
            }),
            ("nothing, and not the last", |cookie| {
                chunk(0, CHUNK_NONE, cookie, &[])
            }),
            ("an unknown chunk", |cookie| {
                chunk(CHUNK_DONE, 77, cookie, &[0; 12])
            }),
            ("block status", |cookie| {
                chunk(CHUNK_DONE, CHUNK_BLOCK_STATUS, cookie, &[1; 12])
            }),
            ("an error longer than its chunk", |cookie| {
                chunk(CHUNK_DONE, CHUNK_IS_ERROR | 1, cookie, &[0xff; 6])
            }),
            ("an error of megabytes", |cookie| {
                chunk(CHUNK_DONE, CHUNK_IS_ERROR | 1, cookie, &[0; 2 << 20])[..32].to_vec()
            }),
            ("a simple reply", |cookie| {
                let head = [MAGIC_SIMPLE_REPLY.to_be_bytes(), [0; 4]].concat();
                [head.as_slice(), &cookie.to_be_bytes(), b"abcdefgh"].concat()
            }),
        ];
        for (what, make) in malformed {
            assert!(read(*make).await.is_err(), "{what}");
        }
    }

    #[tokio::test]
    async fn answers_find_their_requests_in_any_order() {
        let (client, mut server) = pair();
        let serving = thread::spawn(move || {
            let cookies = [(); 3].map(|()| next_request(&mut server));
            for cookie in cookies.into_iter().rev() {
                let data = [cookie as u8; READ_LEN];
                let offset = READ_AT * cookie;
                let answer = data_chunk(CHUNK_DONE, cookie, offset, &data);
                server.write_all(&answer).unwrap();
            }
            server
        });
        // Cookies are counted from 1 in the order of the calls.
        let reads = [1, 2, 3].map(|nth| client.read_at(READ_AT * nth, buffer()));
        let [a, b, c] = reads;
        let (a, b, c) = tokio::join!(a, b, c);
        for (nth, (result, buf)) in [(1, a), (2, b), (3, c)] {
            result.unwrap();
            assert_eq!(buf.as_ref(), [nth; READ_LEN]);
        }
        drop(serving.join().unwrap());
    }

    #[tokio::test]
    async fn settle_waits_for_a_write_whose_future_is_gone() {
        let (client, mut server) = pair();
        {
            let mut write = std::pin::pin!(client.write_at(0, buffer()));
            let first = std::future::poll_fn(|cx| std::task::Poll::Ready(write.as_mut().poll(cx)));
            assert!(first.await.is_pending());
        }
        let cookie = next_request(&mut server);
        let mut data = [0; READ_LEN];
        server.read_exact(&mut data).unwrap();
        let mut settle = std::pin::pin!(client.settle());
        let early = tokio::time::timeout(Duration::from_millis(50), settle.as_mut()).await;
        assert!(early.is_err(), "the server is at it still");
        let answer = [MAGIC_SIMPLE_REPLY.to_be_bytes(), [0; 4]].concat();
        server.write_all(&answer).unwrap();
        server.write_all(&cookie.to_be_bytes()).unwrap();
        settle.await;
    }

    #[tokio::test]
    async fn cancelling_answers_what_is_in_flight_and_all_that_comes() {
        let (client, _silent_server) = pair();
        let (read, ()) = tokio::join!(client.read_at(0, buffer()), async {
            tokio::task::yield_now().await;
            client.cancel_in_flight();
        });
        assert_eq!(read.0.unwrap_err().kind(), io::ErrorKind::NotConnected);
        assert!(client.flush().await.is_err());
        client.settle().await;
    }

    #[test]
    fn what_is_no_nbd_server_is_refused() {
        for greeting in [
            vec![0; 64],
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
            vec![],
        ] {
            let (client, mut server) = UnixStream::pair().unwrap();
            server.write_all(&greeting).unwrap();
            drop(server);
            assert!(Nbd::over(client).is_err());
        }
    }
}
