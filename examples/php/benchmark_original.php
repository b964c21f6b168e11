<?php

/*
 * The original library, PHP to PHP, for examples/benchmark.py: php benchmark_original.php CHECKOUT
 *
 * A master that starts this script again as its slave. What it is to do comes on stdin, a line each ("calls SIZE COUNT",
 * "pipeline IN_FLIGHT COUNT", "flood 0 COUNT"), and is answered by a line once it is done.
 */

declare(strict_types=1);

use StreamIpc\Message\Message;
use StreamIpc\NativeIpcPeer;

$checkout = $argv[1];
spl_autoload_register(function (string $class) use ($checkout): void {
    if (str_starts_with($class, 'StreamIpc\\')) {
        require $checkout . '/src/' . strtr(substr($class, 10), '\\', '/') . '.php';
    }
});

const SMALL = 'task #1234';

final class Payload implements Message
{
    public function __construct(public mixed $body)
    {
    }
}

function slave(): void
{
    $peer = new NativeIpcPeer();
    $session = $peer->createStdioSession();
    $session->onRequest(fn (Payload $request): Message => new Payload($request->body));
    $session->onMessage(function (Payload $message) use ($session): void {
        for ($left = $message->body; $left > 0; $left--) {
            $session->notify(new Payload(SMALL));
        }
    });
    while (!feof(STDIN)) {
        $peer->tick();
    }
}

function master(string $checkout): void
{
    $peer = new NativeIpcPeer();
    // Not createCommandSession(), which drops the process, and PHP closes the pipes with it.
    $process = proc_open([PHP_BINARY, __FILE__, $checkout, 'slave'], [['pipe', 'r'], ['pipe', 'w'], STDERR], $pipes);
    $session = $peer->createStreamSession($pipes[0], $pipes[1]);
    $left = 0;
    $session->onMessage(function (Payload $message) use (&$left): void {
        $left--;
    });
    while (($line = fgets(STDIN)) !== false) {
        [$work, $size, $count] = explode(' ', trim($line));
        if ($work === 'calls') {
            $body = $size === '0' ? SMALL : str_repeat("\0", (int) $size);
            for ($number = 0; $number < $count; $number++) {
                $session->request(new Payload($body))->await();
            }
        } elseif ($work === 'pipeline') {
            $promises = new SplQueue();
            for ($number = 0; $number < $count; $number++) {
                if (count($promises) === (int) $size) {
                    $promises->dequeue()->await();
                }
                $promises->enqueue($session->request(new Payload(SMALL)));
            }
            while (count($promises) > 0) {
                $promises->dequeue()->await();
            }
        } else {
            $left = (int) $count;
            $session->notify(new Payload($left));
            while ($left > 0) {
                $peer->tick();
            }
        }
        echo "done\n";
    }
}

if (($argv[2] ?? '') === 'slave') {
    slave();
} else {
    master($checkout);
}
