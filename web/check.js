// The connection check: tries, one after the other, what an app needs from this network, and says it in plain words.

const PATIENCE_MS = 10_000;
const CLOCK = 'Your clock';
/** Peers whose clocks are further apart may not hear each other, unless their relay makes up for it. */
const CLOCK_SKEW_MS = 60_000;
const $ = id => document.getElementById(id);
const found = [];
/** What is said of a step's outcome, and of a clock. */
const WORDS = { trying: '…', works: 'works', fails: 'does not work', skipped: 'not offered' };
const OF_CLOCK = { ...WORDS, works: 'is right', fails: 'is wrong', skipped: 'is not known' };
const word = (name, state) => (name === CLOCK ? OF_CLOCK : WORDS)[state];

function show(name, state, text) {
  let line = [...$('steps').children].find(({ dataset }) => dataset.name === name);
  if (!line) {
    line = document.createElement('li');
    line.dataset.name = name;
    line.append(document.createElement('strong'), ' ', document.createElement('span'), document.createElement('div'));
    line.children[0].textContent = name;
    line.children[2].className = 'soft';
    $('steps').append(line);
  }
  line.dataset.state = state;
  line.children[1].textContent = word(name, state);
  line.children[1].className = state === 'works' ? 'good' : state === 'fails' ? 'bad' : 'soft';
  line.children[2].textContent = text;
}

/** Runs a step: what it returns is said of it; what it throws, of its failure. */
async function step(name, trying, run) {
  show(name, 'trying', trying);
  let timer;
  try {
    const late = new Promise((_, fail) => { timer = setTimeout(() => fail(new Error('There was no answer in ten seconds.')), PATIENCE_MS); });
    const said = await Promise.race([run(), late]);
    const state = said.skipped ? 'skipped' : 'works';
    show(name, state, said.text);
    found.push({ name, state });
    return true;
  } catch (error) {
    show(name, 'fails', error.message);
    found.push({ name, state: 'fails' });
    return false;
  } finally {
    clearTimeout(timer);
  }
}

const ms = start => `${Math.round(performance.now() - start)} ms`;

function connected(url) {
  return new Promise((done, fail) => {
    const socket = new WebSocket(url);
    socket.onopen = () => done(socket);
    const closed = () => fail(new Error('The relay cannot be reached: this network may not let WebSockets through.'));
    Object.assign(socket, { onerror: closed, onclose: closed });
  });
}

/** Compares this device's clock with the server's, which says only seconds. No answer says nothing of a clock. */
async function clock() {
  const before = Date.now();
  const answer = await fetch('/healthz', { cache: 'no-store', signal: AbortSignal.timeout(PATIENCE_MS / 2) }).catch(() => undefined);
  const date = Date.parse(answer?.headers.get('date'));
  if (Number.isNaN(date)) return { skipped: true, text: 'The server does not say what time it is.' };
  const ahead = (before + Date.now()) / 2 - (date + 500);
  const minutes = Math.round(Math.abs(ahead) / 60_000);
  if (Math.abs(ahead) <= CLOCK_SKEW_MS) return { text: 'It agrees with the server’s.' };
  throw new Error(`It is ${minutes > 120 ? `${Math.round(minutes / 60)} hours` : `${minutes} min`} ${ahead > 0 ? 'ahead of' : 'behind'} the server’s.`);
}

async function relay(url) {
  const start = performance.now();
  const socket = await connected(url);
  socket.close();
  return { text: `Connected after ${ms(start)}.` };
}

async function echo(url) {
  const { topic, event } = await (await fetch('/check/event')).json();
  const socket = await connected(url);
  const start = performance.now();
  try {
    return await new Promise((done, fail) => {
      socket.onclose = () => fail(new Error('The relay closed the connection.'));
      socket.onmessage = ({ data }) => {
        const [verb, , third, reason] = JSON.parse(data);
        if (verb === 'EOSE') socket.send(JSON.stringify(['EVENT', event]));
        if (verb === 'EVENT' && third.id === event.id) done({ text: `There and back in ${ms(start)}.` });
        if (verb === 'OK' && third === false) {
          // A relay for its owner's apps alone does not take the check's message; the way there is open.
          if (/^(blocked|auth-required|restricted)/.test(reason)) done({ skipped: true, text: 'This relay serves its owner’s apps alone.' });
          else fail(new Error(`The relay did not take it: ${reason}`));
        }
      };
      socket.send(JSON.stringify(['REQ', 'check', { kinds: [event.kind], '#x': [topic] }]));
    });
  } finally {
    socket.onclose = null;
    socket.close();
  }
}

/** Gathers candidates with some servers; says of which kinds there are, and whether a server was out of reach. */
async function gather(iceServers, iceTransportPolicy) {
  const connection = new RTCPeerConnection({ iceServers, iceTransportPolicy });
  const kinds = new Set();
  let unreachable = false;
  try {
    await new Promise((done, fail) => {
      connection.onicecandidate = ({ candidate }) => { if (!candidate) done(); else if (candidate.type) kinds.add(candidate.type); };
      connection.onicecandidateerror = ({ errorCode }) => { unreachable ||= errorCode === 701; };
      connection.createDataChannel('check');
      connection.setLocalDescription().catch(fail);
    });
    return { kinds, unreachable };
  } finally {
    connection.close();
  }
}

async function stun(servers) {
  const urls = servers.flatMap(server => server.urls).filter(url => url.startsWith('stun:'));
  if (urls.length === 0) return { skipped: true, text: 'This server names no STUN server.' };
  const { kinds, unreachable } = await gather([{ urls }]);
  if (kinds.has('srflx')) return { text: 'The server answers over UDP, and sees where you come from.' };
  if (unreachable) throw new Error('The server does not answer over UDP: this network may block it.');
  return { text: 'Nothing stands between you and the server.' };
}

/** Two connections of this page, through the relay at `url` alone, and words there and back. */
async function turn(servers, url) {
  const server = servers.find(({ urls, username }) => username && urls.includes(url));
  if (!server) return { skipped: true, text: 'This server does not offer it.' };
  const configuration = { iceServers: [{ ...server, urls: [url] }], iceTransportPolicy: 'relay' };
  const [one, other] = [new RTCPeerConnection(configuration), new RTCPeerConnection(configuration)];
  const start = performance.now();
  let refused;
  for (const connection of [one, other]) {
    connection.addEventListener('icecandidateerror', ({ errorCode }) => { if (errorCode !== 701) refused = errorCode; });
  }
  try {
    return await new Promise((done, fail) => {
      one.onicecandidate = ({ candidate }) => { if (candidate) other.addIceCandidate(candidate).catch(() => {}); };
      other.onicecandidate = ({ candidate }) => { if (candidate) one.addIceCandidate(candidate).catch(() => {}); };
      one.addEventListener('icegatheringstatechange', () => {
        if (one.iceGatheringState !== 'complete' || /typ relay/.test(one.localDescription?.sdp ?? '')) return;
        if (refused === 401 || refused === 403) fail(new Error('The server refuses the credentials that it gave.'));
        else if (refused) fail(new Error(`The server refuses (${refused}).`));
        else fail(new Error('The server cannot be reached this way.'));
      });
      const channel = one.createDataChannel('check');
      channel.onopen = () => channel.send('there');
      channel.onmessage = () => done({ text: `Words went through the relay and back after ${ms(start)}.` });
      other.ondatachannel = ({ channel: theirs }) => { theirs.onmessage = () => theirs.send('back'); };
      (async () => {
        await one.setLocalDescription();
        await other.setRemoteDescription(one.localDescription);
        await other.setLocalDescription();
        await one.setRemoteDescription(other.localDescription);
      })().catch(fail);
    });
  } finally {
    one.close();
    other.close();
  }
}

/** A link with the seed peer, and what that says of the way there. */
async function seed(servers) {
  const urls = servers.flatMap(server => server.urls).filter(url => url.startsWith('stun:'));
  const connection = new RTCPeerConnection({ iceServers: urls.length > 0 ? [{ urls }] : [] });
  try {
    const channel = connection.createDataChannel('data');
    const gathered = new Promise(done => { connection.onicecandidate = ({ candidate }) => candidate ?? done(); });
    await connection.setLocalDescription();
    // A server that does not answer keeps a browser waiting for long.
    await Promise.race([gathered, new Promise(done => { setTimeout(done, 2_000); })]);
    const response = await fetch('/check/link', {
      method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ sdp: connection.localDescription.sdp }),
    });
    const { sdp, reason } = await response.json();
    if (response.status === 404) return { skipped: true, text: 'This server has no seed peer.' };
    if (!response.ok) throw new Error(`The server says: ${reason}.`);
    const start = performance.now();
    await new Promise((done, fail) => {
      channel.onopen = done;
      connection.onconnectionstatechange = () => {
        if (connection.connectionState === 'failed') fail(new Error('No packet comes through to the seed peer: this network may block UDP.'));
      };
      connection.setRemoteDescription({ type: 'answer', sdp }).catch(fail);
    });
    return { text: `Open after ${ms(start)}. ${await nat(connection)}` };
  } finally {
    connection.close();
  }
}

/**
 * What kind of NAT is on the way. The seed's port says how it sees this page: as the page sees itself, as STUN saw it at
 * another port, or under an address made up for this very way.
 */
async function nat(connection) {
  const stats = await connection.getStats();
  const pair = [...stats.values()].find(one => one.type === 'candidate-pair' && one.nominated && one.state === 'succeeded');
  return {
    host: 'Nothing on the way translates addresses.',
    // Browsers hide their own address from pages, so that these two cannot be told apart.
    srflx: 'Others see you under one address, whichever way you take: there is no NAT, or one that keeps an address for all. Direct connections mostly work.',
    prflx: 'Your network translates addresses (NAT) anew for everybody you talk to (symmetric): direct connections are rare, and TURN is needed.',
  }[stats.get(pair?.localCandidateId)?.candidateType] ?? '';
}

async function run() {
  found.length = 0;
  $('steps').replaceChildren();
  $('advice-section').hidden = true;
  $('share').disabled = $('again').disabled = true;
  $('verdict').textContent = 'Trying…';
  let config;
  await step('This server', 'Asking what it offers', async () => {
    config = await (await fetch('/client-config.json')).json();
    return { text: 'It answers.' };
  });
  await step(CLOCK, 'Apps find each other by the time', clock);
  const [url] = config?.relayUrls ?? [`${location.protocol.replace('http', 'ws')}//${location.host}/`];
  const servers = (config?.turnConfig ?? []).map(server => ({ ...server, urls: [server.urls].flat() }));
  const turns = servers.flatMap(({ urls }) => urls).filter(address => /^turns?:/.test(address));
  const offered = test => turns.find(test);
  if (await step('Relay', 'Where apps find each other', () => relay(url))) {
    await step('A message', 'To the relay and back', () => echo(url));
  }
  await step('STUN', 'Finding out how others see you', () => stun(servers));
  await step('Seed peer', 'It keeps the data when everybody is gone', () => seed(servers));
  await step('TURN over UDP', 'The usual way around a NAT', () => turn(servers, offered(address => /^turn:.*(transport=udp|:\d+$)/.test(address))));
  await step('TURN over TCP', 'For networks that block UDP', () => turn(servers, offered(address => /^turn:.*transport=tcp/.test(address))));
  await step('TURN over TLS', 'For networks that let little but the web through', () => turn(servers, offered(address => address.startsWith('turns:'))));

  const failed = name => found.some(one => one.name === name && one.state === 'fails');
  const works = name => found.some(one => one.name === name && one.state === 'works');
  const advice = [];
  if (failed('This server') || failed('Relay')) advice.push('Apps cannot meet anybody from here. Ask whoever runs this network to let WebSockets to this server through, or tell whoever runs the server that its relay is out of reach.');
  if (failed(CLOCK)) advice.push('Apps may not find each other, and what you write may win or lose against what others write. Let this device set its clock by itself; if it is right, tell whoever runs the server that the server’s is wrong.');
  if (failed('A message')) advice.push('The relay takes connections but not messages: tell whoever runs the server.');
  if (failed('Seed peer')) advice.push('The seed peer is out of reach from here: what you write waits until another person is online. Ask whoever runs this network to let UDP through, or tell whoever runs the server.');
  const ways = ['TURN over UDP', 'TURN over TCP', 'TURN over TLS'];
  if (ways.every(name => !works(name))) advice.push('Nothing goes through the TURN server. Calls and data work only with people whom you reach directly. Tell whoever runs the server.');
  else if (failed('TURN over UDP')) advice.push('UDP is blocked here, but another way works: connections will be slower, not broken. Ask whoever runs this network to let UDP through.');
  $('advice').replaceChildren(...advice.map(text => Object.assign(document.createElement('li'), { textContent: text })));
  $('advice-section').hidden = advice.length === 0;
  const troubled = found.filter(({ name, state }) => state === 'fails' && name !== CLOCK).map(({ name }) => name);
  const verdict = [troubled.length > 0 && `Does not work: ${troubled.join(', ')}.`, failed(CLOCK) && 'Your clock is wrong.'].filter(Boolean);
  $('verdict').textContent = verdict.join(' ') || 'Everything works from here.';
  $('verdict').className = verdict.length === 0 ? 'good' : 'bad';
  $('share').disabled = $('again').disabled = false;
}

/** What worked, without a word of where. */
export function report() {
  const browser = /(Firefox|Edg|Chrome|Safari)\/\d+/.exec(navigator.userAgent)?.[0] ?? 'another browser';
  return [`Homeport connection check, ${new Date().toISOString().slice(0, 16)}Z, ${browser}`,
    ...found.map(({ name, state }) => `${name}: ${word(name, state)}`)].join('\n');
}

$('share').addEventListener('click', async () => {
  const text = report();
  try {
    await navigator.clipboard.writeText(text);
    $('share').textContent = 'Copied';
  } catch {
    // Without HTTPS there is no clipboard: show it, to be copied by hand.
    $('share').replaceWith(Object.assign(document.createElement('pre'), { textContent: text }));
  }
});
$('again').addEventListener('click', run);
run();
