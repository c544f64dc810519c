//! Writing QEMU's stream: what is around the records.

use super::qemu::Maker;
use super::sections::{
    ADVISE, COMMAND, CONFIGURATION, DESCRIPTION, END_OF_FILE, FOOTER, Framing, LISTEN, MAGIC, NAME,
    PACKAGED, RUN, SECTION_END, SECTION_PART, SECTION_START, SECTION_VERSION, VERSION,
};

/// Which part of the section comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PartKind {
    Start,
    Part,
    End,
}

/// Records, and what is around them.
#[derive(Clone, Debug)]
pub(crate) struct Writer {
    pub(crate) maker: Maker,
    framing: Framing,
    id: u32,
    /// Whether the guest runs at the other end before the bits come.
    is_postcopy: bool,
    /// Whether the other end was told to run it.
    has_run: bool,
    /// Which part is open.
    open: Option<PartKind>,
    /// Which part was ended last.
    ended: Option<PartKind>,
}

impl Writer {
    pub(crate) fn new(framing: Framing, id: u32, is_postcopy: bool) -> Self {
        Self {
            maker: Maker::default(),
            framing,
            id,
            is_postcopy,
            has_run: false,
            open: None,
            ended: None,
        }
    }

    /// Begins a part, unless it is open.
    #[inline]
    pub(crate) fn open(&mut self, kind: PartKind, out: &mut Vec<u8>) {
        if self.open.is_none() {
            self.begin(kind, out);
        }
    }

    fn begin(&mut self, kind: PartKind, out: &mut Vec<u8>) {
        self.open = Some(kind);
        if self.framing == Framing::Bare {
            return;
        }
        if self.framing == Framing::Whole && kind == PartKind::Start {
            out.extend(MAGIC);
            out.extend(VERSION.to_be_bytes());
            // No name fits every machine.
            out.extend([CONFIGURATION, 0, 0, 0, 0]);
            if self.is_postcopy {
                command(ADVISE, 0, out);
            }
        }
        out.push(match kind {
            PartKind::Start => SECTION_START,
            PartKind::Part => SECTION_PART,
            PartKind::End => SECTION_END,
        });
        out.extend(self.id.to_be_bytes());
        if kind == PartKind::Start {
            out.push(NAME.len() as u8);
            out.extend(NAME.as_bytes());
            out.extend(0u32.to_be_bytes());
            out.extend(SECTION_VERSION.to_be_bytes());
        }
    }

    /// In a whole stream: what has QEMU run its guest before it reads on, as it is. Once.
    pub(crate) fn package(&mut self, out: &mut Vec<u8>) {
        if self.framing != Framing::Whole || self.has_run {
            return;
        }
        self.has_run = true;
        let mut package = Vec::new();
        command(LISTEN, 0, &mut package);
        command(RUN, 0, &mut package);
        command(PACKAGED, 4, out);
        // Two commands.
        out.extend((package.len() as u32).to_be_bytes());
        out.extend(package);
    }

    /// Ends the part that is open.
    pub(crate) fn close(&mut self, out: &mut Vec<u8>) {
        let Some(kind) = self.open.take() else {
            return;
        };
        self.ended = Some(kind);
        Maker::end(out);
        if self.framing == Framing::Bare {
            return;
        }
        out.push(FOOTER);
        out.extend(self.id.to_be_bytes());
        if self.framing == Framing::Whole && kind == PartKind::End {
            out.push(END_OF_FILE);
            if !self.is_postcopy {
                out.push(DESCRIPTION);
                out.extend(2u32.to_be_bytes());
                out.extend(b"{}");
            }
        }
    }

    pub(crate) fn is_open_as(&self, kind: PartKind) -> bool {
        self.open == Some(kind)
    }

    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Whether there is a first part.
    pub(crate) fn has_started(&self) -> bool {
        self.open.is_some() || self.ended.is_some()
    }

    /// Whether there is a last part.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended == Some(PartKind::End)
    }
}

/// A command, without its data.
fn command(command: u16, len: u16, out: &mut Vec<u8>) {
    out.push(COMMAND);
    out.extend(command.to_be_bytes());
    out.extend(len.to_be_bytes());
}
