<?php

/* A slave that answers requests with themselves, and does odd things if it is told to: php slave.php php|json */

declare(strict_types=1);

use App\Message\AnyMessage;
use StreamIpc\Message\LogMessage;
use StreamIpc\Message\Message;
use Wire\Session;

require __DIR__ . '/../../examples/php/wire.php';
require __DIR__ . '/classes.php';

$session = new Session(STDOUT, STDIN, $argv[1], App\Message\CLASSES);

$session->onRequest = function (Message $request) use ($session): ?Message {
    if ($request instanceof LogMessage) {
        return $request->level === 'ask' ? $session->request(new LogMessage($request->message, 'asked')) : null;
    }
    if ($request instanceof AnyMessage && $request->value === 'print') {
        echo 'printed by PHP';
    }
    return $request;
};

$session->onMessage = function (Message $message) use ($session): void {
    if (!$message instanceof LogMessage) {
        $session->notify($message);
    } elseif ($message->level === 'die') {
        throw new RuntimeException("died of {$message->message}");
    } elseif ($message->level === 'flood') {
        for ($number = 1; $number <= (int) $message->message; ++$number) {
            $session->notify(new LogMessage((string) $number, 'flood'));
        }
    }
};

while ($session->tick()) {
}
