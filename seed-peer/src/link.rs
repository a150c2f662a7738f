//! One link to a peer: a WebRTC data channel and the messages on it. Sans-IO, around `str0m`.

mod description;
mod output;

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use genosdb::frame::{Frame, Nonces};
use genosdb::reassembler::ReassemblyError;
use genosdb::{CellIndex, ChannelName, Content, Limits, Message, Reassembler};
use str0m::change::{SdpAnswer, SdpOffer, SdpPendingOffer};
use str0m::channel::ChannelId;
use str0m::config::DtlsCert;
use str0m::net::{Protocol, Receive};
use str0m::{Candidate, Event, IceConnectionState, Input, Output, Rtc, RtcConfig};

pub(crate) use description::DescriptionError;
use description::{Description, RemoteCandidates};
pub(crate) use output::{CloseReason, LinkOutput, Refused, Step};

/// The label of the data channel that carries everything (wire §2).
const CHANNEL_LABEL: &str = "data";
/// Frames wait while more than this is on its way (wire §3).
const BUFFERED_HIGH: usize = 65_535;
/// More frames are written when less than this is on its way.
const BUFFERED_LOW: usize = 32 << 10;
/// Bytes that SCTP may hold; the most of a full state that is in flight.
const SEND_CAP: usize = 256 << 10;
/// A link that was quiet for so long is asked whether its peer is there.
const QUIET: Duration = Duration::from_secs(10);
/// A peer that does not answer for so long is gone.
const UNANSWERED: Duration = Duration::from_secs(10);
/// Messages that may wait for a peer that reads slowly.
const MAX_WAITING: usize = 1_024;
/// Bytes of messages that may wait for it; a single message may be larger.
const MAX_WAITING_BYTES: usize = 64 << 20;
/// Malformed frames and messages after which a peer is not worth a link.
const MAX_MALFORMED: u32 = 64;

/// What a link listens to, and what its peer may make us hold.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Listening {
    /// Whether the graph's channel is wanted. Frames of channels that are not wanted are not kept.
    pub(crate) graph: bool,
    /// Whether the channels of cells are wanted.
    pub(crate) cells: bool,
    pub(crate) limits: Limits,
}

/// A message that is being sent.
struct Sending {
    message: Message,
    nonce: u8,
    next_frame: usize,
}

pub(crate) struct Link {
    rtc: Rtc,
    ufrag: String,
    pending: Option<SdpPendingOffer>,
    channel: Option<ChannelId>,
    sending: VecDeque<Sending>,
    waiting_bytes: usize,
    nonces: Nonces,
    graph: bool,
    cells: bool,
    speaks_cells: bool,
    reassembler: Reassembler,
    malformed: u32,
    heard: Instant,
    asked: Option<Instant>,
    disconnected: Option<Instant>,
    outputs: VecDeque<LinkOutput>,
    closed: bool,
    /// The last step on the way to an open channel.
    step: Option<Step>,
    /// The peer's, as it has described itself.
    candidates: RemoteCandidates,
    /// Where packets go now.
    destination: Option<SocketAddr>,
    now: Instant,
}

impl Link {
    fn new(
        now: Instant,
        certificate: DtlsCert,
        candidates: Vec<Candidate>,
        listening: Listening,
    ) -> Result<Self, DescriptionError> {
        let mut rtc = RtcConfig::new()
            .clear_codecs()
            .set_dtls_cert(certificate)
            .set_sctp_max_buffered_amount(SEND_CAP)
            .build(now);
        let added = candidates.into_iter().filter_map(|candidate| rtc.add_local_candidate(candidate).cloned()).count();
        if added == 0 {
            return Err(DescriptionError::NoAddress);
        }
        let ufrag = rtc.direct_api().local_ice_credentials().ufrag;
        Ok(Self {
            rtc,
            ufrag,
            pending: None,
            channel: None,
            sending: VecDeque::new(),
            waiting_bytes: 0,
            nonces: Nonces::default(),
            graph: listening.graph,
            cells: listening.cells,
            speaks_cells: false,
            reassembler: Reassembler::new(listening.limits),
            malformed: 0,
            heard: now,
            asked: None,
            disconnected: None,
            outputs: VecDeque::new(),
            closed: false,
            step: None,
            candidates: RemoteCandidates::default(),
            destination: None,
            now,
        })
    }

    /// Dials: the link, and the offer for the peer.
    pub(crate) fn offer(
        now: Instant,
        certificate: DtlsCert,
        candidates: Vec<Candidate>,
        listening: Listening,
    ) -> Result<(Self, String), DescriptionError> {
        let mut link = Self::new(now, certificate, candidates, listening)?;
        let mut api = link.rtc.sdp_api();
        api.add_channel(CHANNEL_LABEL.into());
        let (offer, pending) = api.apply().ok_or_else(|| DescriptionError::Sdp("nothing to offer".into()))?;
        link.pending = Some(pending);
        Ok((link, offer.to_sdp_string()))
    }

    /// Answers: the link, and the answer for the peer that sent `offer`.
    pub(crate) fn answer(
        now: Instant,
        certificate: DtlsCert,
        candidates: Vec<Candidate>,
        listening: Listening,
        offer: &str,
    ) -> Result<(Self, String), DescriptionError> {
        let described = Description::read(offer);
        let offer = SdpOffer::from_sdp_string(&described.sdp).map_err(DescriptionError::sdp)?;
        let mut link = Self::new(now, certificate, candidates, listening)?;
        let answer = link.rtc.sdp_api().accept_offer(offer).map_err(DescriptionError::sdp)?;
        link.described(described);
        Ok((link, answer.to_sdp_string()))
    }

    /// Takes the peer's answer to our offer.
    pub(crate) fn accept_answer(&mut self, answer: &str) -> Result<(), DescriptionError> {
        let described = Description::read(answer);
        let answer = SdpAnswer::from_sdp_string(&described.sdp).map_err(DescriptionError::sdp)?;
        let pending = self.pending.take().ok_or(DescriptionError::NotOffered)?;
        self.rtc.sdp_api().accept_answer(pending, answer).map_err(DescriptionError::sdp)?;
        self.described(described);
        Ok(())
    }

    /// The peer has described itself.
    fn described(&mut self, peer: Description) {
        self.candidates = peer.candidates;
        self.take_step(Step::Described);
    }

    fn take_step(&mut self, step: Step) {
        self.step = Some(step);
        self.outputs.push_back(LinkOutput::Step(step));
    }

    /// The last step on the way to an open channel.
    pub(crate) fn step(&self) -> Option<Step> {
        self.step
    }

    /// The kind of the peer's candidate that packets go to, as the peer called it; `prflx` for one that it did not name.
    pub(crate) fn remote_candidate_type(&self) -> &'static str {
        self.candidates.kind_of(self.destination)
    }

    /// Our ICE user name: STUN requests of the peer start with it.
    pub(crate) fn ufrag(&self) -> &str {
        &self.ufrag
    }

    /// Whether a packet is for this link; for STUN, its integrity is checked.
    pub(crate) fn accepts(&self, input: &Input<'_>) -> bool {
        self.rtc.accepts(input)
    }

    /// Takes a packet.
    pub(crate) fn handle_packet(&mut self, now: Instant, input: Input<'_>) {
        self.now = now;
        if let Err(error) = self.rtc.handle_input(input) {
            tracing::debug!(%error, "a link failed on a packet");
            self.close(CloseReason::Failed);
        }
    }

    /// Tells the time.
    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        self.now = now;
        if let Err(error) = self.rtc.handle_input(Input::Timeout(now)) {
            tracing::debug!(%error, "a link failed on a timeout");
            self.close(CloseReason::Failed);
        }
        self.watch(now);
    }

    /// Asks a quiet peer whether it is there, and gives up on one that does not answer (wire §3).
    fn watch(&mut self, now: Instant) {
        if self.channel.is_none() {
            return;
        }
        if self.disconnected.is_some_and(|since| now >= since + UNANSWERED) {
            self.close(CloseReason::Silent);
        } else if let Some(asked) = self.asked {
            if now >= asked + UNANSWERED {
                self.close(CloseReason::Silent);
            }
        } else if now >= self.heard + QUIET {
            self.asked = Some(now);
            self.send(Message::empty(ChannelName::PING));
        }
    }

    fn watch_at(&self) -> Option<Instant> {
        self.channel?;
        let asked = self.asked.map_or(self.heard + QUIET, |asked| asked + UNANSWERED);
        Some(self.disconnected.map_or(asked, |since| asked.min(since + UNANSWERED)))
    }

    /// Queues a message for the peer.
    pub(crate) fn send(&mut self, message: Message) {
        if self.closed {
            return;
        }
        let too_much = self.waiting_bytes + message.len() > MAX_WAITING_BYTES && !self.sending.is_empty();
        if self.sending.len() >= MAX_WAITING || too_much {
            self.close(CloseReason::Slow);
            return;
        }
        let nonce = self.nonces.next(message.channel());
        self.waiting_bytes += message.len();
        self.sending.push_back(Sending { message, nonce, next_frame: 0 });
        self.write();
    }

    /// Whether messages wait for the peer to take those before them.
    pub(crate) fn is_busy(&self) -> bool {
        !self.sending.is_empty()
    }

    /// Writes frames while the peer takes them.
    fn write(&mut self) {
        let Some(id) = self.channel else { return };
        while let Some(sending) = self.sending.front_mut() {
            let Some(mut channel) = self.rtc.channel(id) else { return };
            if channel.buffered_amount() > BUFFERED_HIGH {
                return;
            }
            let frame = sending.message.frame(sending.nonce, sending.next_frame);
            match channel.write(true, &frame) {
                Ok(true) => {
                    sending.next_frame += 1;
                    if sending.next_frame >= sending.message.frames() {
                        self.waiting_bytes -= sending.message.len();
                        self.sending.pop_front();
                    }
                }
                // No room yet: the event about the buffered amount comes back here.
                Ok(false) => return,
                Err(error) => {
                    tracing::debug!(%error, "a link failed on writing");
                    self.close(CloseReason::Failed);
                    return;
                }
            }
        }
    }

    /// Ends the link; the peer is told by DTLS.
    pub(crate) fn close(&mut self, reason: CloseReason) {
        if self.closed {
            return;
        }
        self.closed = true;
        if let Err(error) = self.rtc.close() {
            tracing::debug!(%error, "a link did not close in order");
        }
        self.outputs.push_back(LinkOutput::Closed(reason));
    }

    /// Whether nothing is left to send.
    pub(crate) fn is_idle(&mut self) -> bool {
        let buffered =
            self.channel.and_then(|id| self.rtc.channel(id)).map_or(0, |mut channel| channel.buffered_amount());
        self.sending.is_empty() && buffered == 0
    }

    /// What the link has to say; call until it is a timeout. After [`LinkOutput::Closed`] only packets follow.
    pub(crate) fn poll(&mut self) -> LinkOutput {
        loop {
            if let Some(output) = self.outputs.pop_front() {
                return output;
            }
            if !self.rtc.is_alive() {
                if !self.closed {
                    self.closed = true;
                    return LinkOutput::Closed(CloseReason::Failed);
                }
                return LinkOutput::Timeout(self.now + Duration::from_secs(3600));
            }
            match self.rtc.poll_output() {
                Ok(Output::Timeout(at)) => {
                    return LinkOutput::Timeout(self.watch_at().map_or(at, |watch| at.min(watch)));
                }
                Ok(Output::Transmit(transmit)) => {
                    self.destination = Some(transmit.destination);
                    return LinkOutput::Transmit {
                        source: transmit.source,
                        destination: transmit.destination,
                        bytes: transmit.contents.into(),
                    };
                }
                Ok(Output::Event(event)) => self.event(event),
                Err(error) => {
                    tracing::debug!(%error, "a link failed");
                    self.rtc.disconnect();
                    if !self.closed {
                        self.closed = true;
                        return LinkOutput::Closed(CloseReason::Failed);
                    }
                }
            }
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::ChannelOpen(id, _) if self.channel.is_none() => {
                self.channel = Some(id);
                self.heard = self.now;
                if let Some(mut channel) = self.rtc.channel(id) {
                    channel.set_buffered_amount_low_threshold(BUFFERED_LOW);
                }
                self.outputs.push_back(LinkOutput::Opened);
                self.write();
            }
            Event::ChannelData(data) if Some(data.id) == self.channel && !self.closed => self.receive(&data.data),
            Event::ChannelBufferedAmountLow(id) if Some(id) == self.channel => self.write(),
            Event::ChannelClose(id) if Some(id) == self.channel => self.close(CloseReason::Left),
            Event::Closed => self.close(CloseReason::Left),
            Event::IceConnectionStateChange(IceConnectionState::Disconnected) => {
                self.disconnected.get_or_insert(self.now);
            }
            Event::IceConnectionStateChange(state) => {
                self.disconnected = None;
                let is_reached = matches!(state, IceConnectionState::Connected | IceConnectionState::Completed);
                if is_reached && self.step == Some(Step::Described) {
                    self.take_step(Step::Reached);
                }
            }
            Event::Connected => self.take_step(Step::Sealed),
            _ => {}
        }
    }

    fn receive(&mut self, bytes: &[u8]) {
        self.heard = self.now;
        self.asked = None;
        let frame = match Frame::parse(bytes) {
            Ok(frame) => frame,
            Err(error) => {
                tracing::debug!(%error, "a frame was refused");
                return self.refuse(Refused::Frame);
            }
        };
        let is_of_a_cell = CellIndex::of_channel(frame.channel).is_some();
        if is_of_a_cell && !self.cells && !self.speaks_cells {
            self.speaks_cells = true;
            self.outputs.push_back(LinkOutput::SpeaksCells);
        }
        let wanted = (self.graph && frame.channel == ChannelName::SYNC_GRAPH) || (self.cells && is_of_a_cell);
        if !frame.channel.is_internal() && !wanted {
            return;
        }
        match self.reassembler.push(&frame) {
            Ok(None) => {}
            Ok(Some((ChannelName::PING, _))) => self.send(Message::empty(ChannelName::PONG)),
            Ok(Some((ChannelName::PONG, _))) => {}
            Ok(Some((ChannelName::LEAVE, _))) => self.close(CloseReason::Left),
            // Renegotiation for media: a peer without media ignores it.
            Ok(Some((channel, _))) if channel.is_internal() => {}
            Ok(Some((channel, content))) => {
                let size = match &content {
                    Content::Json(text) | Content::Text(text) => text.len(),
                    Content::Binary { bytes, .. } => bytes.len(),
                };
                self.outputs.push_back(LinkOutput::Message { channel, content, bytes: size });
            }
            Err(ReassemblyError::Content) => self.refuse(Refused::Message),
            Err(error) => {
                tracing::debug!(%error, "a peer goes beyond its limits");
                self.outputs.push_back(LinkOutput::Refused(Refused::Message));
                self.close(CloseReason::Misbehaved);
            }
        }
    }

    /// Leaves something of the peer out; a peer that sends little else is dropped.
    pub(crate) fn refuse(&mut self, what: Refused) {
        self.outputs.push_back(LinkOutput::Refused(what));
        self.malformed += 1;
        if self.malformed > MAX_MALFORMED {
            self.close(CloseReason::Misbehaved);
        }
    }
}

/// A packet as a link takes it.
pub(crate) fn packet<'a>(
    now: Instant,
    source: SocketAddr,
    destination: SocketAddr,
    bytes: &'a [u8],
) -> Option<Input<'a>> {
    let contents = bytes.try_into().ok()?;
    Some(Input::Receive(now, Receive { proto: Protocol::Udp, source, destination, contents }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Listening = Listening {
        graph: false,
        cells: false,
        limits: Limits { message_bytes: 1, unfinished_bytes: 1, unfinished_messages: 1, meta_bytes: 1 },
    };

    fn certificate() -> DtlsCert {
        let provider = str0m::crypto::from_feature_flags();
        let certificate = provider.dtls_provider.generate_certificate().unwrap();
        provider.install_process_default();
        certificate
    }

    fn candidates() -> Vec<Candidate> {
        vec![Candidate::host("127.0.0.1:1".parse().unwrap(), "udp").unwrap()]
    }

    #[test]
    fn text_that_is_no_description_is_refused() {
        let certificate = certificate();
        for text in ["", "v=0\r\n", "hello", &"a=x\r\n".repeat(10_000)] {
            assert!(Link::answer(Instant::now(), certificate.clone(), candidates(), NOTHING, text).is_err());
        }
    }

    proptest::proptest! {
        #[test]
        fn no_description_makes_a_link_panic(
            changes in proptest::collection::vec((proptest::prelude::any::<proptest::sample::Index>(), 0..4u8, " -~"), 1..6),
            answers in proptest::prelude::any::<bool>(),
        ) {
            let now = Instant::now();
            let (mut dialled, offer) = Link::offer(now, certificate(), candidates(), NOTHING).unwrap();
            let (_, answer) = Link::answer(now, certificate(), candidates(), NOTHING, &offer).unwrap();
            let mut lines: Vec<String> =
                if answers { &answer } else { &offer }.split_inclusive('\n').map(str::to_owned).collect();
            for (index, kind, text) in changes {
                let index = index.index(lines.len());
                match kind {
                    0 => lines[index] = text,
                    1 => lines.push(lines[index].clone()),
                    2 if lines.len() > 1 => drop(lines.remove(index)),
                    _ => lines[index].insert_str(0, &text),
                }
            }
            let changed = lines.concat();
            // Either is fine; a panic is not.
            if answers {
                let _ = dialled.accept_answer(&changed);
                dialled.handle_timeout(now);
            } else {
                let _ = Link::answer(now, certificate(), candidates(), NOTHING, &changed);
            }
        }

        #[test]
        fn no_packet_makes_a_link_panic(packets in proptest::collection::vec(proptest::collection::vec(proptest::prelude::any::<u8>(), 0..100), 1..20)) {
            let now = Instant::now();
            let (mut link, _) = Link::offer(now, certificate(), candidates(), NOTHING).unwrap();
            let address = "127.0.0.1:2".parse().unwrap();
            for bytes in &packets {
                if let Some(input) = packet(now, address, "127.0.0.1:1".parse().unwrap(), bytes) {
                    link.handle_packet(now, input);
                }
            }
            while !matches!(link.poll(), LinkOutput::Timeout(_)) {}
        }
    }
}
