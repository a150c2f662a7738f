// A proxy that ends TLS and speaks HTTP alone, as those in front of web servers do, with WebSockets: for a process of its own.
// Arguments: the files of the certificate and its key, the port to listen on, and the port behind it, which has TLS too.
import { readFileSync } from 'node:fs';
import { createServer, request } from 'node:https';

const [cert, key, port, behind] = process.argv.slice(2);
const onward = ({ method, url, headers }) => request({ host: '127.0.0.1', port: behind, method, path: url, headers, rejectUnauthorized: false });
const server = createServer({ cert: readFileSync(cert), key: readFileSync(key) }, (asked, answer) => {
  asked.pipe(onward(asked).on('response', got => {
    answer.writeHead(got.statusCode, got.headers);
    got.pipe(answer);
  }).on('error', () => answer.destroy()));
});
server.on('upgrade', (asked, socket, said) => {
  onward(asked).on('upgrade', ({ headers }, stream, answered) => {
    const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`);
    socket.write(`HTTP/1.1 101 Switching Protocols\r\n${lines.join('')}\r\n`);
    // What either side has said behind its head already.
    socket.write(answered);
    stream.write(said);
    socket.pipe(stream).pipe(socket);
    for (const end of [socket, stream]) end.on('error', () => { socket.destroy(); stream.destroy(); });
  }).on('error', () => socket.destroy()).end();
});
server.listen(port, () => console.log('ready'));
