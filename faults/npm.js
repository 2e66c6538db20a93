'use strict';

// A worker process that uses npm redfour, as worker.go uses the library: it
// reports events on stdout until stdin says "stop".
//
//   node npm.js <redis url> <namespace> <ids, separated by commas> <ttl in ms>

const readline = require('readline');
const { promisify } = require('util');
const Lock = require('redfour');

const [url, namespace, idList, ttlText] = process.argv.slice(2);
const ids = idList.split(',');
const ttl = Number(ttlText);

const lock = new Lock({ redis: url, namespace });
const waitAcquire = promisify(lock.waitAcquireLock.bind(lock));
const release = promisify(lock.releaseLock.bind(lock));

// Its clients report broken connections and connect again.
lock._redisConnection.on('error', () => {});
lock._redisSubscriber.on('error', () => {});

// JSON has no room for so large a number, and JavaScript no precision: the line is put together by hand.
const now = () => process.hrtime.bigint();
function say(event, at = now(), until) {
  const rest = JSON.stringify({ worker: 0, ...event }).slice(1);
  process.stdout.write(`{"at":${at},` + (until ? `"until":${until},` : '') + rest + '\n');
}

const pause = promisify(setTimeout);
let stopping = false;

async function section(id) {
  const called = now();
  say({ what: 'wait', id, ttl }, called);
  let lease;
  try {
    lease = await waitAcquire(id, ttl, 2000);
  } catch (err) {
    return say({ what: 'returned', result: 'unknown', text: String(err) });
  }
  if (!lease.success) {
    return say({ what: 'returned', result: 'locked', holder: lease.index });
  }
  // Nothing tells when the attempt that got it was sent, so this is the only moment from which the lease is certain.
  say({ what: 'returned', result: 'granted', index: lease.index }, now(), called + BigInt(ttl) * 1000000n);
  say({ what: 'write', id, index: lease.index });
  await pause(Math.random() * 3);
  say({ what: 'release', id, index: lease.index });
  try {
    const { result } = await release(lease);
    say({ what: 'returned', result: result === 'released' ? 'done' : result });
  } catch (err) {
    say({ what: 'returned', result: 'unknown', text: String(err) });
  }
}

async function main() {
  say({ what: 'ready' });
  for (let n = 0; !stopping; n++) {
    await section(ids[n % ids.length]);
    await pause(Math.random() * 20);
  }
  say({ what: 'ended' });
  process.exit(0);
}

readline.createInterface({ input: process.stdin })
  .on('line', line => { stopping = stopping || line === 'stop'; })
  .on('close', () => process.exit(0));
main();
