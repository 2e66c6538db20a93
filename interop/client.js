'use strict';

// A peer for the Go tests: works npm redfour or ioredfour as told on stdin, and answers on stdout, a line of JSON each.
//
//   node client.js redfour|ioredfour <redis url> <namespace>
//   node client.js ioredfour cluster:<port>,<port>… <namespace>
//
//   -> {"n": 1, "do": "acquire", "id": "42", "ttl": 1000}
//   <- {"n": 1, "reply": {"id": "42", "success": true, "index": 7, "ttl": 1000}}
//
// The first line out is {"n": 0}, when it is subscribed. A "wait" also answers {"n": …, "waiting": true} each time that it has found the lock
// held and is listening for its release, and only then: a release before that could be missed, which is the libraries' own gap.

const fs = require('fs');
const path = require('path');
const readline = require('readline');
const { promisify } = require('util');

const [library, url, namespace] = process.argv.slice(2);

const lua = name => fs.readFileSync(path.join(__dirname, name + '.lua'), 'utf8');
const scripts = { enter: lua('enter'), renew: lua('renew') };

const Lock = require(library);
const ports = url.startsWith('cluster:') && url.slice('cluster:'.length).split(',');
const lock = new Lock(ports
  ? { cluster: ports.map(port => ({ host: '127.0.0.1', port: Number(port) })), namespace }
  : { redis: url, namespace });
const commands = lock._redisConnection;
const keyOf = id => ports ? lock._lockKey(id) : `${namespace}:${id}`;

// Both libraries take callbacks.
const call = (object, method) => promisify(object[method].bind(object));
const acquire = call(lock, 'acquireLock');
const waitAcquire = call(lock, 'waitAcquireLock');
const release = call(lock, 'releaseLock');

const send = message => process.stdout.write(JSON.stringify(message) + '\n');

// waiters says which command waits under a lock's key. Both libraries add a listener for the key when they start to wait; the event
// comes just before it is added, so the message leaves with the next tick.
const waiters = new Map();
lock._subscribers.on('newListener', key => {
  const n = waiters.get(key);
  if (n !== undefined) process.nextTick(send, { n, waiting: true });
});

async function wait({ n, id, ttl, patience }) {
  const key = keyOf(id);
  waiters.set(key, n);
  try {
    return await waitAcquire(id, ttl, patience);
  } finally {
    waiters.delete(key);
  }
}

// renew gives a lease a new ttl. ioredfour calls that extending; redfour 1.0 cannot do it, so redfour 2's contract stands in.
async function renew({ lease, ttl }) {
  if (library === 'ioredfour') return call(lock, 'extendLock')(lease, ttl);
  const result = await call(commands, 'eval')(scripts.renew, 1, keyOf(lease.id), lease.index, ttl);
  return { id: lease.id, success: result === 'renewed', result };
}

// contend goes through as many sections as it can for the given time. Who is inside is counted over another connection, as the
// resource that a lock protects would see it.
async function contend({ id, ttl, patience, who, inside, entries }) {
  const resource = commands.duplicate();
  const enter = call(resource, 'eval');
  const leave = call(resource, 'decr');
  const end = Date.now() + patience;
  let sections = 0, longest = 0;
  for (let left = patience; left > 0; left = end - Date.now()) {
    const from = Date.now();
    const lease = await waitAcquire(id, ttl, left);
    longest = Math.max(longest, Date.now() - from);
    if (!lease.success) continue;
    await enter(scripts.enter, 2, inside, entries, who, lease.index);
    await leave(inside);
    const { result } = await release(lease);
    if (result !== 'released') throw new Error(`release of ${lease.index}: ${result}`);
    sections++;
  }
  await call(resource, 'quit')();
  return { sections, longest };
}

const actions = {
  acquire: ({ id, ttl }) => acquire(id, ttl),
  release: ({ lease }) => release(lease),
  wait,
  renew,
  contend
};

function fail(err) {
  console.error(err);
  process.exit(1);
}

async function handle(line) {
  const request = JSON.parse(line);
  send({ n: request.n, reply: await actions[request.do](request) });
}

async function main() {
  commands.on('error', fail);
  lock._redisSubscriber.on('error', fail);
  // The libraries do not say when they are subscribed. Subscribing again is confirmed after the first time.
  await call(lock._redisSubscriber, ports ? 'ssubscribe' : 'subscribe')(lock._releaseChannel || `${namespace}-release`);
  const input = readline.createInterface({ input: process.stdin });
  input.on('line', line => handle(line).catch(fail));
  input.on('close', () => process.exit(0));
  send({ n: 0 });
}

main().catch(fail);
