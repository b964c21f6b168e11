<?php

/* The messages that both sides of the examples share; examples/php_slave.py has the same in Python. */

declare(strict_types=1);

namespace App\Message;

use StreamIpc\Message\Message;

final class TaskRequest implements Message
{
    public function __construct(public string $job, public array $options = [])
    {
    }
}

final class TaskResponse implements Message
{
    public function __construct(public string $result, public array $wordLengths, private string $doneBy)
    {
    }

    public function doneBy(): string
    {
        return $this->doneBy;
    }
}

final class Progress implements Message
{
    public function __construct(public int $done, public int $total)
    {
    }
}

final class SettingRequest implements Message
{
    public function __construct(public string $name)
    {
    }
}

final class SettingResponse implements Message
{
    public function __construct(public string $value)
    {
    }
}

const CLASSES = [
    TaskRequest::class,
    TaskResponse::class,
    Progress::class,
    SettingRequest::class,
    SettingResponse::class,
];
