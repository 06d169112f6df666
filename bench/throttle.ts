/**
 * Owns a shard that is as slow as it is told to be: a TCP relay between an attention-shard and nats-server, in a process
 * of its own, that lets what the shard answers through at so many bytes per second and nothing else meanwhile.
 *
 * Invariants
 * 1. It is one device: while it is busy with one answer the next one waits, and a wave's layer is answered no sooner for
 *    another wave being there.
 * 2. Being busy costs no CPU: the thread sleeps (Atomics.wait, to some 0.1 ms).
 *
 * `throttle.js natsPort` says its port over IPC and takes nanoseconds per byte, 0 at first.
 */
import { type AddressInfo, connect, createServer } from 'node:net';

let nanosecondsPerByte = 0;
const never = new Int32Array(new SharedArrayBuffer(4));
const server = createServer((client) => {
  const upstream = connect(Number(process.argv[2]), '127.0.0.1');
  for (const socket of [client, upstream]) {
    socket.setNoDelay(true);
    socket.on('error', () => {
      client.destroy();
      upstream.destroy();
    });
    socket.on('close', () => {
      client.destroy();
      upstream.destroy();
    });
  }
  upstream.pipe(client);
  client.on('data', (chunk) => {
    const busyMs = (chunk.length * nanosecondsPerByte) / 1e6;
    if (busyMs > 0) Atomics.wait(never, 0, 0, busyMs);
    upstream.write(chunk);
  });
});
server.listen(0, '127.0.0.1', () => process.send?.((server.address() as AddressInfo).port));
process.on('message', (value) => {
  nanosecondsPerByte = Number(value);
});
process.on('disconnect', () => process.exit(0));
